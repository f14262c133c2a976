"""The run folder of a recipe: locked, created at the start, compared with the recipe on resume."""

import logging
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from moma.data.remote.fetching import published_manifests
from moma.data.remote.manifest import Manifest
from moma.errors import UserError
from moma.files import lock_folder
from moma.recipe import Config
from moma.runs import Run, Tokenizers
from moma.runtime.world import World, gather, on_rank_0
from moma.train.recipe import Recipe
from moma.train.restore import ROUTER_RUN, read_run_recipe

logger = logging.getLogger(__name__)

# Seconds to wait for the lock of a run folder; a network file system releases that of a dead node
# sooner.
_LOCK_TIMEOUT = 120.0

STAGES = ("pretrain", "upcycle", "aux_router")
# Keys that may change on resume: paths, monitoring and machines do not change what is computed,
# except for the global batch size, which may depend on the machines.
_RESUMABLE = (
    "run",
    "from",  # needed only at the start
    "data.path",
    "data.remote",
    "data.cache_bytes",
    "data.workers",
    "data.prefetch",
    "engine.reduce_once",
    "engine.replicate",
    "engine.recompute",
    "engine.global_batch_size",
    "engine.timeout",
    "engine.trace",
    "STAGE.log_every",
    "STAGE.checkpoint_every",
    "STAGE.keep_checkpoints",
    "STAGE.keep_every",
    "STAGE.gradient_accumulation_steps",
    "STAGE.on_fault",
    "STAGE.explosion",
)


def lock_run_folder(run: Run, recipe: Recipe, world: World, stack: ExitStack) -> bool:
    """Lock the run folder on rank 0, if it exists; all ranks together.

    Args:
        stack: releases the lock when it is closed.

    Returns:
        Whether the folder exists, on all ranks.

    Raises:
        UserError: another process holds the lock for too long.
    """
    exists = gather(run.path.is_dir(), world.writers)[0]
    if exists:
        # Half, so that the other ranks, which wait for the result, do not time out first.
        timeout = min(_LOCK_TIMEOUT, recipe.engine.timeout / 2)
        on_rank_0(world, lambda: stack.enter_context(lock_folder(run.path, timeout)))
    return exists


def create_run_folder(run: Run, recipe: Recipe, world: World, stack: ExitStack) -> None:
    """Create and lock the folder of a new run; all ranks together.

    Args:
        stack: as for `lock_run_folder`.

    Raises:
        UserError: another process has started the run meanwhile.
    """
    on_rank_0(world, lambda: run.path.mkdir(parents=True, exist_ok=True))
    lock_run_folder(run, recipe, world, stack)
    on_rank_0(world, _require_not_started, run)


def refuse_other_recipe(run: Run, recipe: Recipe) -> list[str]:
    """Differences from the recipe of the run in the folder; raises `UserError` unless allowed."""
    if not run.exists:
        return []
    changes = differences(read_run_recipe(run), recipe)
    allowed = [key.replace("STAGE", recipe.stage) for key in _RESUMABLE]
    prefixes = (
        "tracking.",
        "validation.",
        *(f"{stage}." for stage in STAGES if stage != recipe.stage),
    )
    refused = [
        text for key, text in changes.items() if key not in allowed and not key.startswith(prefixes)
    ]
    if refused:
        hint = "choose another folder with run=…, or delete this one"
        if any(text.startswith("data.sources.") for text in refused):
            hint = f"a run keeps the sources that it began with: {hint}"
        if recipe.from_ and recipe.stage == "aux_router" and "stage" in changes:
            key = shlex.quote(f"run={recipe.from_ / ROUTER_RUN}")
            hint = f"train routers in a folder of their own: {key}"
        raise UserError(f"{run.path}: holds a run of another recipe ({'; '.join(refused)}); {hint}")
    return list(changes.values())


def check_run_folder(run: Run, recipe: Recipe) -> list[str]:
    """Check that a recipe may start or resume a run in its folder; writes nothing.

    Returns:
        Differences from the recipe of the run in the folder, if there is one.

    Raises:
        UserError: the folder holds another run, the prepared data or other files.
    """
    if not run.exists and run.path.resolve() == recipe.data.path.resolve():
        raise UserError(f"{run.path}: holds the prepared data; choose another folder with run=…")
    if not run.exists:
        run.require_free()
    return refuse_other_recipe(run, recipe)


def write_run_folder(run: Run, recipe: Recipe, shards: Mapping[str, Manifest]) -> None:
    """Create or update the run folder, after `check_run_folder`; copy missing tokenizers.

    Args:
        shards: as `provide_training_data` returned them, before the data was opened.

    Raises:
        UserError: as for `check_run_folder`; or the data has other tokenizers than the run, or was
            prepared anew since.
    """
    if published_manifests(recipe.data) != shards:
        raise UserError(
            f"{recipe.data.path}: was prepared anew while the run started; start it again"
        )
    data = Tokenizers(recipe.data.path)
    changes = check_run_folder(run, recipe)
    if not run.exists:
        run.path.mkdir(parents=True, exist_ok=True)
        run.create(recipe, data, shards)
    if shown := [
        text for text in changes if not text.startswith(("run:", "data.path:", "data.remote:"))
    ]:
        logger.warning("%s: resuming with %s", run.path, "; ".join(shown))
    run.copy_tokenizers(data)
    # Reached through a link, such as that of a study, a run keeps its own path.
    own = read_run_recipe(run).run
    is_linked = own.resolve() == recipe.run.resolve()
    run.update_recipe(recipe.model_copy(update={"run": own}) if is_linked else recipe)


def differences(before: Config, after: Config) -> dict[str, str]:
    """Keys whose values differ, each with a text such as `data.micro_batch_size: 8 → 16`."""
    old, new = (_flat(config.model_dump(mode="json", by_alias=True)) for config in (before, after))
    return {
        key: f"{key}: {_format(old.get(key))} → {_format(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def _require_not_started(run: Run) -> None:
    """Check that no other process has started a new run since this one looked."""
    if run.exists:
        raise UserError(
            f"{run.path}: another process has started this run; run the command again to resume it"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [_flat(part, f"{prefix}.{name}") for name, part in pairs]
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {prefix.removeprefix("."): value}


def _format(value: Any) -> str:
    return "none" if value is None else f"'{value}'" if isinstance(value, str) else str(value)
