"""From a run folder back to a model."""

import sys
from pathlib import Path

import torch

from moma.errors import SharedError, UserError
from moma.model.transformer import Transformer
from moma.recipe import read_recipe
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in, load_model, newest_whole, read_state
from moma.runtime.world import World, local_device
from moma.train.recipe import Recipe
from moma.vocabulary import Vocabulary

ROUTER_RUN = "aux_router"


def read_run_recipe(run: Run) -> Recipe:
    """The recipe of a run.

    Raises:
        UserError: the folder is no run.
    """
    return read_recipe(Recipe, run.require().recipe)


def newest_checkpoint(run: Run, world: World | None = None) -> Path:
    """The newest checkpoint of a run whose files are all as they were written.

    Args:
        run: whose it is.
        world: ranks that look for it together; left out, this process alone.

    Raises:
        UserError: there is none.
    """
    world = world or World(local_device())
    found, damaged = newest_whole(run.require().checkpoints, world)
    if found is None:
        raise SharedError(
            f"{run.path}: has no checkpoint yet; go on with `moma train {run.recipe}`"
        )
    if world.rank == 0:
        for message in damaged.values():
            print(f"{message}; takes {found.name}", file=sys.stderr)
    return found


def with_routers(run: Run) -> Run:
    """The finished run that trained this run's auxiliary routers, in its folder; else the run."""
    found = _trained_routers(Run(run.path / ROUTER_RUN))
    return run if found is None else found[0]


def _trained_routers(run: Run) -> tuple[Run, Path] | None:
    """A run that trains routers and its newest whole checkpoint, if that is of its last step."""
    if not checkpoints_in(run.checkpoints):
        return None
    recipe = read_run_recipe(run)
    if recipe.stage != "aux_router":
        return None
    found = newest_checkpoint(run)
    return (run, found) if read_state(found)["step"] >= recipe.stage_config.steps else None


def load_run(run: Run) -> tuple[Transformer, Recipe]:
    """The model of a run on this machine's device, in evaluation mode, and its recipe.

    Raises:
        UserError: the folder is no run or has no checkpoint.
    """
    routers = _trained_routers(Run(run.path / ROUTER_RUN))
    run, checkpoint = routers or (run, newest_checkpoint(run))
    recipe = read_run_recipe(run)
    model = Transformer(recipe.model, Vocabulary.load(run.tokenizers.vocabulary), recipe.shares)
    load_model(checkpoint, model, World(torch.device("cpu")))
    return model.to(local_device()).eval(), recipe


def has_causal_routing(run: Run, model: Transformer) -> bool:
    """Whether a run's model can be used causally: it has no routers, or they are trained."""
    if model.is_causal_without_routers:
        return True
    return any(_trained_routers(each) for each in (Run(run.path / ROUTER_RUN), run))


def require_causal_routing(run: Run, model: Transformer) -> None:
    """Refuse causal use of a model whose auxiliary routers are not trained.

    Raises:
        UserError: saying how to train them.
    """
    if not has_causal_routing(run, model):
        raise UserError(
            f"{run.path}: its auxiliary routers are not trained, so it cannot run causally; train "
            f"them with `moma train {run.recipe} stage=aux_router from={run.path} "
            f"run={run.path / ROUTER_RUN}`"
        )
