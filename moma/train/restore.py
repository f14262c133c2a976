"""From a run folder back to a model."""

import sys
from pathlib import Path

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
        raise SharedError(f"{run.path}: has no checkpoint yet; go on with `moma train`")
    if world.rank == 0:
        for message in damaged.values():
            print(f"{message}; takes {found.name}", file=sys.stderr)
    return found


def load_weights(run: Run, model: Transformer) -> None:
    """Load the newest weights of a run into a model of its shape."""
    load_model(newest_checkpoint(run), model, World(next(model.parameters()).device))


def with_routers(run: Run) -> Run:
    """The finished run that trained this run's auxiliary routers, in its folder; else the run."""
    inner = Run(run.path / ROUTER_RUN)
    return inner if is_finished(inner) else run


def is_finished(run: Run) -> bool:
    """Whether a run has reached the last step of its recipe."""
    found = checkpoints_in(run.checkpoints)
    return bool(found) and (
        read_state(found[-1])["step"] >= read_run_recipe(run).stage_config.steps
    )


def load_run(run: Run) -> tuple[Transformer, Recipe]:
    """The model of a run on this machine's device, in evaluation mode, and its recipe.

    Raises:
        UserError: the folder is no run or has no checkpoint.
    """
    newest_checkpoint(run)
    run = with_routers(run)
    recipe = read_run_recipe(run)
    model = Transformer(recipe.model, Vocabulary.load(run.tokenizers.vocabulary), recipe.shares)
    load_weights(run, model)
    return model.to(local_device()).eval(), recipe


def has_causal_routing(run: Run, model: Transformer) -> bool:
    """Whether a run's model can be used causally: it has no routers, or they are trained."""
    trained = with_routers(run)
    by_routers = read_run_recipe(trained).stage == "aux_router" and is_finished(trained)
    return by_routers or model.is_causal_without_routers


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
