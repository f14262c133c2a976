"""Load the model of a run folder."""

import logging
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field

from moma.data.batches.iterator import training_fingerprint
from moma.data.remote.fetching import provide_data, published_manifests
from moma.data.remote.manifest import Manifest
from moma.data.shards import require_data_folder
from moma.errors import SharedError, UserError, shell_command
from moma.model.attention_kernels import kernel_without_compilation
from moma.model.dispatch import dispatch_for
from moma.model.routing import ROUTINGS, ExpertChoice, Half, RoutingName
from moma.model.transformer import Transformer
from moma.recipe import Config, check
from moma.runs import Run
from moma.runtime.checkpoint import (
    checkpoints_in,
    is_weights_only,
    load_model,
    newest_intact,
    read_rank_states,
    read_state,
)
from moma.runtime.world import World, from_rank_0, local_device, raise_on_all_ranks
from moma.train.recipe import Recipe
from moma.train.thresholds import load_thresholds
from moma.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

ROUTER_RUN = "aux_router"


def read_run_recipe(run: Run) -> Recipe:
    """The recipe of a run; raises `UserError` if the folder is not a run."""
    return run.read_recipe(Recipe)


class _RunShards(Config):
    shards: dict[str, Manifest] = Field(default={})


def trained_shards(run: Run) -> dict[str, Manifest]:
    """Return which shards at an address a run trains on, by source; none if it has no address.

    Raises:
        UserError: the folder is not a run, or its manifest is damaged.
    """
    shards = run.read_manifest().get("shards", {})
    return check(_RunShards, {"shards": shards}, str(run.manifest)).shards


def provide_training_data(run: Run, recipe: Recipe, world: World) -> dict[str, Manifest]:
    """Fetch what a run trains on, of `data.remote`; all ranks call it together.

    A run that begins trains on the newest shards, or, if it continues another run, on those of
    that run, whose training must not have seen what is held out: the same on all machines, also if
    others are published meanwhile.

    Returns:
        Which shards at the address they are, by source.

    Raises:
        UserError: as for `provide_data`.
    """
    manifests = from_rank_0(world, _fetch_shards, run, recipe)
    with raise_on_all_ranks(world):
        provide_data(recipe.data, manifests=manifests)
    return manifests


def _fetch_shards(run: Run, recipe: Recipe) -> dict[str, Manifest]:
    source = Run(recipe.from_) if recipe.from_ is not None else run
    if run.exists:
        provide_data(recipe.data, manifests=trained_shards(run))
    elif recipe.stage != "pretrain" and source.exists:
        provide_data(recipe.data, refresh=True, manifests=trained_shards(source))
    else:
        provide_data(recipe.data, refresh=True)
    return published_manifests(recipe.data)


def newest_checkpoint(run: Run, world: World | None = None) -> Path:
    """The newest intact checkpoint of a run; all ranks of `world`, if given, call it together.

    Raises:
        UserError: there is none.
    """
    world = world or World(local_device())
    newest, damaged = newest_intact(run.require().checkpoints, world)
    if newest is None:
        command = shell_command("train", run.recipe)
        raise SharedError(f"{run.path}: has no checkpoint yet; go on with `{command}`")
    if world.rank == 0:
        for message in damaged.values():
            logger.warning("%s; using %s", message, newest.name)
    return newest


class LoadedRun(NamedTuple):
    """The run and checkpoint that a model is loaded from.

    Attributes:
        run: the run of the stage `aux_router` in a run's folder, if it is finished, or that run.
        checkpoint: its newest intact checkpoint.
        has_auxiliary: whether its auxiliary routers are trained.
    """

    run: Run
    checkpoint: Path
    has_auxiliary: bool


def run_to_load(run: Run) -> LoadedRun:
    """Find what a run's model is loaded from; raises `UserError` if it has no checkpoint."""
    if trained := _trained_routers(Run(run.path / ROUTER_RUN)) or _trained_routers(run):
        return LoadedRun(*trained, True)
    return LoadedRun(
        run, newest_checkpoint(run), read_run_recipe(run).stage_config.auxiliary_routers
    )


def load_run(run: Run) -> tuple[Transformer, Recipe]:
    """Load a run's model onto this machine's device, in evaluation mode, and its recipe.

    It computes in the run's `engine.compute`, as a sharded model in training does: weights have
    that dtype, except for those of routers, whose close calls rounding would decide.
    Trained auxiliary routers in the run's folder are loaded too; causal routing uses them only if
    there are no thresholds.

    Raises:
        UserError: the folder is not a run, has no checkpoint or lacks its vocabulary.
    """
    folder, (run, checkpoint, has_auxiliary) = run, run_to_load(run)
    recipe = read_run_recipe(run)
    vocabulary = Vocabulary.load(run.require_tokenizers().vocabulary)
    require_vocabulary(checkpoint, vocabulary, run.path)
    device = local_device()
    kernel = kernel_without_compilation(recipe.attention_kernel(device))
    model = Transformer(recipe.model, vocabulary, recipe.shares, kernel, dispatch_for(device))
    load_model(checkpoint, model, World(torch.device("cpu")))
    load_thresholds(folder, checkpoint, model)
    model.has_auxiliary = has_auxiliary
    if has_auxiliary and not model.has_thresholds:
        model.causal_routing = ROUTINGS["auxiliary"]
    routers = *model.routers(), *model.token_routers(), *model.auxiliary_routers()
    exact = {parameter for router in routers for parameter in router.parameters()}
    for parameter in model.parameters():
        if parameter not in exact:
            parameter.data = parameter.data.to(recipe.engine.compute_dtype(device))
    return model.to(device).eval(), recipe


def require_vocabulary(checkpoint: Path, vocabulary: Vocabulary, folder: Path) -> None:
    """Raise `UserError` if a checkpoint was trained with another vocabulary."""
    if read_state(checkpoint)["vocabulary"] != vocabulary.fingerprint:
        raise SharedError(f"{checkpoint}: trained with another vocabulary than that in {folder}")


def require_training_data(run: Run, recipe: Recipe) -> None:
    """Check that prepared data is what a run was trained on, before it is evaluated.

    Otherwise documents that are held out now may have been trained on. A run that has only weights
    does not know its data.

    Args:
        recipe: `data.path` is the prepared data.

    Raises:
        UserError: it is other data, or prepared in another way.
    """
    checkpoint = newest_checkpoint(run)
    if is_weights_only(checkpoint):
        return
    own = read_run_recipe(run)
    if own.stage == "aux_router" and own.from_ is not None and Run(own.from_).exists:
        source = Run(own.from_)
        _require_shards_of_source(run, source)
        require_training_data(source, recipe)
    keys = ("path", "remote", "cache_bytes")
    data = own.data.model_copy(update={key: getattr(recipe.data, key) for key in keys})
    vocabulary = Vocabulary.load(run.require_tokenizers().vocabulary)
    provide_data(data, manifests=trained_shards(run))
    require_data_folder(data.path)
    has_sources = all(data.folder(source.name).is_dir() for source in data.sources)
    found = training_fingerprint(data, vocabulary, own.seed) if has_sources else None
    if found != read_rank_states(checkpoint)[0]["data"]["fingerprint"]:
        raise UserError(
            f"{recipe.data.path}: is not the data that {run.path} was trained on (documents or "
            "data.held_out have changed), so what it holds out may have been trained on; prepare "
            "it as before, or train a new run"
        )


def _require_shards_of_source(run: Run, source: Run) -> None:
    shards, own = trained_shards(source), trained_shards(run)
    if any(shards[name] != own[name] for name in shards.keys() & own.keys()):
        raise UserError(
            f"{run.path}: was trained on other documents than {source.path}, so what it holds out "
            "may have been trained on there; train the routers again, with another run=…"
        )


def has_routing(model: Transformer, routing: RoutingName) -> bool:
    """Whether a loaded model can use a routing: its thresholds are known, or its routers trained.

    Without expert choice, a model is causal by construction, and has neither.
    """
    if not model.config.has_expert_choice:
        return routing in ("choice", "causal")
    depth, policy = model.config.depth_config, model.named_routing(routing).depth
    if isinstance(policy, ExpertChoice):
        return True
    if policy.uses_auxiliary:
        return model.has_auxiliary
    for_half = depth is not None and depth.router_loss > 0
    return model.has_thresholds and (for_half or not isinstance(policy, Half))


def require_routing(run: Run, model: Transformer, routing: RoutingName = "causal") -> None:
    """Raise `UserError` if a run's model cannot use a routing; the message has the command."""
    if has_routing(model, routing):
        return
    if not model.config.has_expert_choice:
        raise UserError(
            f"{run.path}: is causal by construction, without thresholds and auxiliary routers; use "
            "causal routing"
        )
    if routing == "auxiliary":
        raise UserError(
            f"{run.path}: its auxiliary routers are not trained; train them with "
            f"`{router_command(run)}`, or route by thresholds"
        )
    if routing == "half" and not model.config.depth_layers:
        raise UserError(f"{run.path}: has no depth routers, which 'half' is for; use thresholds")
    if routing == "half" and model.has_thresholds:
        raise UserError(
            f"{run.path}: its depth routers were not trained to decide by a score of one half "
            "(model.depth.router_loss); route by thresholds"
        )
    raise UserError(
        f"{run.path}: the thresholds of its routers are not known, so it cannot run causally; "
        f"compute them with `{shell_command('calibrate', run.path)}`"
    )


def router_command(run: Run) -> str:
    """The command that trains a run's auxiliary routers."""
    keys = ("stage=aux_router", f"from={run.path}", f"run={run.path / ROUTER_RUN}")
    return shell_command("train", run.recipe, *keys)


def _trained_routers(run: Run) -> tuple[Run, Path] | None:
    """A run of the stage `aux_router` and its last checkpoint, if it is finished and intact."""
    if not run.exists or not checkpoints_in(run.checkpoints):
        return None
    recipe = read_run_recipe(run)
    if recipe.stage != "aux_router":
        return None
    newest = newest_checkpoint(run)
    return (run, newest) if read_state(newest)["step"] >= recipe.stage_config.steps else None
