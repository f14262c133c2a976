"""A study: a grid of variants and seeds in one file, run by any number of processes.

    extends = "../demo.toml"         # or a list of files
    run = "runs/study/routing"       # contains a folder for each run: VARIANT-SEED

    [study]
    seeds = [0, 1, 2]
    measures = ["held_out", "routing"]

    [[study.variants]]               # the first is the baseline
    name = "moe_4t4i"

    [[study.variants]]
    name = "mod_moe_4t4i"
    model = { groups = "mod_moe_4t4i", layers = 7 }

A variant contains keys of a recipe, or a `chain` (`train/chain.py`). Runs of the same seed see the
same batches in the same order. A run is trained and measured by the process that locks it first;
its result is `results/VARIANT-SEED/result.json`. Finished runs are not repeated.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from moma.errors import UserError
from moma.files import atomic_write, fingerprint, lock_folder, read_json
from moma.recipe import Config, RequiredPath, Seed, check, merge_tables, override, read_values
from moma.runs import Run
from moma.runtime.world import World
from moma.study.documents import documents_fingerprint
from moma.study.measures import MEASURES
from moma.study.speedup import with_seconds
from moma.train.chain import Evaluate, Evaluation, chain_of, read_manifests, run_chain
from moma.train.changes import refuse_other_recipe
from moma.train.recipe import Recipe
from moma.train.thresholds import thresholds_file

logger = logging.getLogger(__name__)

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class StudyConfig(Config):
    """What a study measures.

    Attributes:
        seeds: the recipe's `seed` of each run of a variant.
        measures: what is measured of each finished run: `held_out` (losses under each routing),
            `routing` (what causal routing changes; docs/study.md), `scores` (of routers), and the
            suites `perplexity`, `captions` and `retrieval` on all held-out documents.
        batches: number of held-out micro-batches of the first three; 0: all.
    """

    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    measures: tuple[str, ...] = ("held_out",)
    batches: int = Field(64, ge=0)

    @field_validator("seeds", "measures")
    @classmethod
    def _check_different(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{twice[0]} is given twice; give it once")
        return values

    @field_validator("measures")
    @classmethod
    def _check_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in MEASURES]:
            raise ValueError(f"there is no measure '{unknown[0]}'; use {', '.join(MEASURES)}")
        return names


class _Variant(Config):
    """Keys of a variant beside those of a recipe.

    Attributes:
        name: of which its runs' folders are named.
        curve: the scaling curve of which it is one size; see `scaling.py`.
    """

    name: str = Field(pattern=_NAME)
    curve: str | None = Field(None, pattern=_NAME)


class _Own(Config):
    """What a study has of the recipe's keys: its folder, and the seed of the data of all runs."""

    run: RequiredPath
    seed: Seed = 0


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        stages: what is trained; the last stage that trains a model is measured.
        result: the file of its result.
    """

    variant: str
    seed: int
    curve: str | None
    stages: tuple[Recipe | Evaluation, ...]
    result: Path
    config: StudyConfig

    @property
    def name(self) -> str:
        """`VARIANT-SEED`."""
        return f"{self.variant}-{self.seed}"

    @property
    def recipes(self) -> list[Recipe]:
        """The stages that train."""
        return [stage for stage in self.stages if isinstance(stage, Recipe)]

    @property
    def model_runs(self) -> list[Run]:
        """The folders of the stages that train the model, a seed run first."""
        return [Run(each.run) for each in self.recipes if each.stage != "aux_router"]

    @property
    def run(self) -> Run:
        """The folder of the run that is measured."""
        return self.model_runs[-1]

    def read_metrics(self) -> list[dict[str, Any]]:
        """The log records of the model's training, those of a seed run first."""
        logs = [run.read_metrics() for run in self.model_runs]
        return with_seconds([record for log in logs for record in log])

    def require_same_recipes(self) -> None:
        """Raise `UserError` if a folder has a run of another recipe."""
        for recipe in self.recipes:
            refuse_other_recipe(Run(recipe.run), recipe)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of what is measured: recipes, checkpoints, thresholds, and how much data.

        Raises:
            FileNotFoundError: a checkpoint was removed while it was read.
        """
        content = read_manifests(each.run for each in self.recipes)
        if (thresholds := thresholds_file(self.run)).is_file():
            content += thresholds.read_bytes()
        recipes = [recipe.model_dump_json() for recipe in self.recipes]
        return fingerprint(content + json.dumps([*recipes, self.config.batches]).encode())

    def read_result(self) -> dict[str, Any] | None:
        """The run's result; None if it is not measured, or was trained again since.

        Raises:
            UserError: the file was not written by a study.
        """
        if not self.result.is_file():
            return None
        result = read_json(self.result)
        if not isinstance(result, dict) or not isinstance(result.get("measures"), dict):
            raise UserError(f"{self.result}: not written by moma, and is not replaced; rename it")
        try:
            is_current = result.get("fingerprint") == self.fingerprint
        except FileNotFoundError:  # another process trains it
            return None
        is_complete = set(self.config.measures) <= result["measures"].keys()
        return result if is_current and is_complete else None


@dataclass(frozen=True)
class Study:
    """A study as `read_study` reads it."""

    path: Path
    config: StudyConfig
    runs: tuple[StudyRun, ...]
    data_seed: int

    @property
    def recipe(self) -> Recipe:
        """The first recipe with the seed of the data that all runs read, whatever their seeds."""
        return self.runs[0].recipes[0].model_copy(update={"seed": self.data_seed})

    def finished(self) -> "Study":
        """The study of the runs that have a result."""
        return replace(self, runs=tuple(run for run in self.runs if run.read_result() is not None))


def read_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study; overrides apply to every run, `study.…` to the study itself.

    Raises:
        UserError: a key or value is wrong; the message names it and its variant.
    """
    values = read_values(path, overrides, Recipe)
    table = values.pop("study", None)
    if not isinstance(table, dict):
        raise UserError(f"{path}: is no study; write a [study] table with [[study.variants]]")
    variants = table.pop("variants", None)
    if not isinstance(variants, list) or not variants:
        raise UserError(f"{path}: 'study.variants': write one [[study.variants]] for each")
    config = check(StudyConfig, table, f"{path}, [study]")
    given = {key: values[key] for key in ("run", "seed") if key in values}
    own_keys = check(_Own, {"run": "runs/study"} | given, str(path))
    base = own_keys.run
    names = [text.partition("=")[0].strip() for text in overrides]
    if refused := [name for name in names if name == "seed" or name.startswith("chain.")]:
        raise UserError(f"override '{refused[0]}': a study has study.seeds, and chains of variants")
    last = [text for text, name in zip(overrides, names, strict=True) if _is_of_recipe(name)]
    runs: list[StudyRun] = []
    for seed in config.seeds:
        for number, changes in enumerate(deepcopy(variants), 1):
            origin = f"{path}, variant {number}"
            named = {key: changes.pop(key) for key in ("name", "curve") if key in changes}
            variant = check(_Variant, named, origin)
            if fixed := [key for key in ("seed", "run") if key in changes]:
                raise UserError(f"{origin}: '{fixed[0]}' is set by the study; leave it out")
            if variant.curve is not None and "held_out" not in config.measures:
                raise UserError(f"{origin}: a curve needs 'held_out' in study.measures")
            name = variant.name
            own = merge_tables(deepcopy(values), changes) | {"seed": seed}
            own["run"] = str(base / f"{name}-{seed}")
            chain = own.pop("chain", None)
            stages: Sequence[Recipe | Evaluation]
            if chain is None:
                stages = [check(Recipe, override(own, last, Recipe), origin)]
            else:
                stages = chain_of(own, chain, origin, last)
            file = base / "results" / f"{name}-{seed}" / "result.json"
            runs.append(StudyRun(name, seed, variant.curve, tuple(stages), file, config))
    _check_runs(path, runs)
    return Study(base, config, tuple(runs), own_keys.seed)


def _is_of_recipe(key: str) -> bool:
    return key != "run" and not key.startswith("study.")


def _check_runs(path: Path, runs: Sequence[StudyRun]) -> None:
    names = [run.name for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: two variants have runs named {twice[0]}; give each its own name")
    folders = [recipe.run.absolute() for run in runs for recipe in run.recipes]
    first = runs[0].recipes[0]
    for run in runs:
        origin = f"{path}, variant '{run.variant}'"
        if not run.model_runs:
            raise UserError(f"{origin}: trains no model; begin its chain with one")
        if shared := [each.run for each in run.recipes if folders.count(each.run.absolute()) > 1]:
            raise UserError(f"{origin}: {shared[0]} is the folder of several runs")
        if any(each.seed != run.seed for each in run.recipes):
            raise UserError(f"{origin}: 'seed' is set by the study; leave it out")
        if any(_held_out_data(run, each) != _held_out_data(run, first) for each in run.recipes):
            raise UserError(
                f"{origin}: has another [data]; all runs of a study have the same, except that "
                "micro_batch_size may differ with study.batches=0"
            )


def _held_out_data(run: StudyRun, recipe: Recipe) -> dict[str, object]:
    """What must be equal for losses of the same documents, by expert choice among the same tokens.

    If all held-out documents are measured, expert choice may be among other numbers of tokens.
    """
    ignored = {} if run.config.batches else {"micro_batch_size": None}
    return vars(recipe.data) | ignored


def run_unfinished(
    runs: Iterable[StudyRun],
    evaluate: Evaluate,
    world: World,
    report: Callable[[StudyRun], object] = lambda run: None,
    quiet: bool = True,
) -> dict[str, str]:
    """Train and measure, one after another, the runs that no other process does.

    Args:
        runs: in this order.
        evaluate: see `run_chain`.
        report: called with each run that this process begins.
        quiet: whether to hide the progress of the runs.

    Returns:
        The messages of the runs that cannot be trained, such as diverging ones, by their names.

    Raises:
        StoppedError: a signal arrived; progress is saved.
    """
    failures = {}
    for run in runs:
        run.result.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_folder(run.result.parent, timeout=-1))
            except UserError:
                continue  # another process runs it
            if run.read_result() is None:
                report(run)
                try:
                    _run(run, evaluate, world, quiet)
                except UserError as error:
                    logger.warning("%s: %s", run.name, error)
                    failures[run.name] = str(error)
    return failures


def _run(run: StudyRun, evaluate: Evaluate, world: World, quiet: bool) -> None:
    run_chain(run.stages, world, evaluate, quiet)
    result = {
        "variant": run.variant,
        "seed": run.seed,
        "run": run.run.path.name,
        "flops": run.read_metrics()[-1]["flops"],
        "fingerprint": run.fingerprint,
        "measures": {
            name: MEASURES[name](run.run, run.config.batches) for name in run.config.measures
        },
        "documents": documents_fingerprint(run.recipes[-1].data),
    }
    atomic_write(run.result, json.dumps(result, indent=2) + "\n")
