"""A recipe that changed between stop and resume: what passes, what is refused."""

import sys
from fnmatch import fnmatch
from functools import partial
from typing import Any

from moma.errors import UserError
from moma.files import atomic_replace
from moma.recipe import Config, write_recipe
from moma.runs import Run, Tokenizers
from moma.runtime.world import World, raise_on_all_ranks
from moma.train.recipe import Recipe
from moma.train.restore import ROUTER_RUN, read_run_recipe

STAGES = ("pretrain", "upcycle", "aux_router")
# Where things are, how they are watched and on what they run: the result stays what it was, but for
# the tokens of a step, which may follow the machines.
_HARMLESS = (
    "run",
    "from",  # needed only to begin
    "data.path",
    "data.workers",
    "data.prefetch",
    "engine.replicate",
    "engine.recompute",
    "engine.step_size",
    "engine.timeout",
    "engine.trace",
    "tracking.*",
    "STAGE.log_every",
    "STAGE.checkpoint_every",
    "STAGE.keep_checkpoints",
    "STAGE.keep_every",
    "STAGE.gradient_accumulation_steps",
    "STAGE.on_fault",
    "STAGE.explosion",
)


def refuse_other_recipe(run: Run, recipe: Recipe) -> list[str]:
    """Compare with the recipe of the run that the folder holds, if it holds one.

    Returns:
        The differences that do no harm.

    Raises:
        UserError: there are others; the message shows them.
    """
    if not run.recipe.is_file():
        return []
    changes = differences(read_run_recipe(run), recipe)
    patterns = [each.replace("STAGE", recipe.stage) for each in _HARMLESS]
    patterns += [f"{stage}.*" for stage in STAGES if stage != recipe.stage]
    harmful = [
        text for key, text in changes.items() if not any(fnmatch(key, each) for each in patterns)
    ]
    if harmful:
        way_out = "choose another folder with run=…, or delete this one"
        if recipe.from_ and recipe.stage == "aux_router" and "stage" in changes:
            way_out = f"routers go into a folder of their own: run={recipe.from_ / ROUTER_RUN}"
        raise UserError(
            f"{run.path}: holds a run of another recipe ({'; '.join(harmful)}); {way_out}"
        )
    return list(changes.values())


def check_resumed_recipe(run: Run, recipe: Recipe, data: Tokenizers, world: World) -> None:
    """Make the run folder, or check that it was made by this recipe; all ranks together.

    Raises:
        UserError: the folder belongs to something else.
    """
    with raise_on_all_ranks(world):
        if world.rank == 0:
            _claim(run, recipe, data)


def differences(before: Config, after: Config) -> dict[str, str]:
    """Keys whose values differ, each with a text such as `data.micro_batch_size: 8 → 16`."""
    old, new = (_flat(config.model_dump(mode="json", by_alias=True)) for config in (before, after))
    return {
        key: f"{key}: {_shown(old.get(key))} → {_shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def _claim(run: Run, recipe: Recipe, data: Tokenizers) -> None:
    if run.recipe.is_file():
        changes = refuse_other_recipe(run, recipe)
        moved = [text for text in changes if not text.startswith(("run:", "data.path:"))]
        if moved:
            print(f"{run.path}: goes on with {'; '.join(moved)}", file=sys.stderr)
        if not changes:
            return
    elif run.path.resolve() == data.path.resolve():
        raise UserError(f"{run.path}: holds the prepared data; choose another folder with run=…")
    else:
        run.path.mkdir(parents=True, exist_ok=True)
        data.copy_to(run.tokenizers)
    atomic_replace(run.recipe, partial(write_recipe, recipe))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [_flat(part, f"{prefix}.{name}") for name, part in pairs]
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {prefix.removeprefix("."): value}


def _shown(value: Any) -> str:
    return "none" if value is None else f"'{value}'" if isinstance(value, str) else str(value)
