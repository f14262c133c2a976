"""Speed of the trainer's step: tokens a second, model FLOPs utilization (MFU) and memory.

    for each recipe: synthetic documents → packing → steps of `moma train`, compiled, warmed up
    in every round:  one step of each recipe       → medians, and ratios round by round

`bench_statistics` measures the cost of the log in the same way: a step without statistics of the
routers, one that keeps what a log record needs, and one that writes such a record.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from operator import sub
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.bench.timing import Job, clock_of, interleaved, median_ratio, seconds, spread
from moma.errors import UserError
from moma.progress import show_progress
from moma.recipe import read_recipe, shipped_recipe
from moma.runtime.peak import allocated_peak, matmul_peak
from moma.runtime.world import World, can_compile, local_device
from moma.train.metrics import MetricsWindow
from moma.train.monitor import LossMonitor
from moma.train.recipe import Recipe
from moma.train.stages import flops_per_token, make_step, prepare_model
from moma.train.statistics import Statistics
from moma.train.step import next_token_objective

# Recipes of each model size of Table 2: without and with mixture-of-depths.
ROWS = {
    "256": ("bench/256.toml", "bench/256_mod.toml"),
    **{
        size: (f"paper/base/{size}.toml", f"paper/base/{size}_mod.toml")
        for size in ("90m", "435m", "1b4")
    },
}
TABLE2 = ("dense", "moe_8x", "moe_1t1i", "moe_4t4i", "mod_moe_1t1i", "mod_moe_4t4i")
# Steps after which the micro-batches repeat.
_STEPS = 4
_RATE = 1e-4


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        repeats: rounds, in each of which every recipe takes a step.
        warm_up: steps of each recipe before; the first of them compiles.
        cpu_time: whether processor time is measured, which leaves out other processes and adds up
            threads.
    """

    repeats: int = 11
    warm_up: int = 2
    cpu_time: bool = False


def table2(
    row: str, overrides: Sequence[str] = (), only: Sequence[str] = TABLE2
) -> dict[str, Recipe]:
    """The architectures of Table 2 at one model size, so at about the same FLOPs per token.

    Args:
        row: model size of Table 1, or `256`.
        overrides: changes to each recipe.
        only: some of the architectures; `dense`, the baseline, is always added.

    Raises:
        UserError: there is no such row or architecture, or an override is wrong.
    """
    if row not in ROWS:
        raise UserError(f"--row {row}: use {', '.join(ROWS)}")
    if unknown := [name for name in only if name not in TABLE2]:
        raise UserError(f"--only {unknown[0]}: use {', '.join(TABLE2)}")
    plain, deep = (shipped_recipe(name) for name in ROWS[row])
    return {
        name: read_recipe(
            Recipe,
            deep if name.startswith("mod") else plain,
            [f"model.groups={name}", *overrides],
        )
        for name in TABLE2
        if name in ("dense", *only)
    }


def named(paths: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """Recipes by the names of their files.

    Raises:
        UserError: one cannot be read, or two files have the same name.
    """
    recipes: dict[str, Recipe] = {}
    for path in paths:
        if path.stem in recipes:
            raise UserError(f"{path}: another recipe is named {path.stem}, too; rename one")
        recipes[path.stem] = read_recipe(Recipe, path, overrides)
    return recipes


def bench_throughput(
    recipes: Mapping[str, Recipe], sizes: Sizes, baseline: str = "first", quiet: bool = False
) -> list[dict[str, Any]]:
    """Measure recipes by name, in interleaved rounds.

    Returns:
        For each the figures that `docs/bench.md` lists. `ratio_to_…` and the `baseline`'s name
        is the median of the ratios to the first recipe's speed, round by round.

    Raises:
        UserError: a recipe cannot be packed, or needs more memory than there is.
    """
    device = local_device()
    runners = _runners(recipes, device, sizes, quiet)
    peak_of = dict.fromkeys((runner.dtype for runner in runners), 0.0)

    def measure_peak(done: int = 0) -> None:
        for dtype, best in peak_of.items():
            peak_of[dtype] = max(best, matmul_peak(device, dtype))
        report(done)

    timed = [partial(runner.timed, runner.train, sizes.cpu_time) for runner in runners]
    with show_progress("rounds", sizes.repeats, quiet) as report:
        taken = interleaved(timed, sizes.repeats, measure_peak)
    speeds = [
        [runner.tokens / each for each in own] for runner, own in zip(runners, taken, strict=True)
    ]
    return [
        {
            "name": runner.name,
            "tokens_per_second": statistics.median(own),
            "spread": spread(own),
            f"ratio_to_{baseline}": median_ratio(own, speeds[0]),
            "mfu": statistics.median(own) * runner.flops_per_token / peak_of[runner.dtype],
            "peak_bytes": runner.peak_bytes,
            "flops_per_token": round(runner.flops_per_token),
            "parameters": runner.parameters,
        }
        for runner, own in zip(runners, speeds, strict=True)
    ]


def bench_statistics(
    recipes: Mapping[str, Recipe], sizes: Sizes, quiet: bool = False
) -> list[dict[str, Any]]:
    """Measure what the log's statistics of routers and gradients cost.

    Returns:
        For each recipe `name`; median `step_seconds` of a step without any; `keeping` and
        `logging`, the seconds that statistics of the routers add to it, and that a log record
        adds; `overhead`, both as a fraction of a step, with a record every `log_every` steps.
    """
    device = local_device()
    jobs = ("train_without_statistics", "train", "train_and_log")
    runners = _runners(recipes, device, sizes, quiet, jobs)
    timed = [
        partial(runner.timed, getattr(runner, job), sizes.cpu_time)
        for runner in runners
        for job in jobs
    ]
    with show_progress("rounds", sizes.repeats, quiet) as report:
        taken = interleaved(timed, sizes.repeats, report)
    by_runner = [taken[first : first + len(jobs)] for first in range(0, len(taken), len(jobs))]
    return [_overhead(runner, *found) for runner, found in zip(runners, by_runner, strict=True)]


def _overhead(
    runner: "_Runner", bare: list[float], kept: list[float], logged: list[float]
) -> dict[str, Any]:
    keeping, logging = (
        statistics.median(map(sub, *pair)) for pair in ((kept, bare), (logged, kept))
    )
    step = statistics.median(bare)
    return {
        "name": runner.name,
        "step_seconds": step,
        "keeping": keeping,
        "logging": logging,
        "overhead": (keeping + logging / runner.config.log_every) / step,
    }


class _Runner:
    """A recipe's model, with the step of `moma train`, on synthetic micro-batches.

    As a context it is on the device; outside, a GPU is left to the others.
    """

    def __init__(self, name: str, recipe: Recipe, device: torch.device, parks: bool):
        recipe = recipe.model_copy(update={"stage": "pretrain", "from_": None})
        vocabulary, world = synthetic_vocabulary(recipe), World(device)
        self.name, self.config = name, recipe.pretrain
        self.flops_per_token = flops_per_token(recipe, vocabulary)
        self.dtype = recipe.engine.compute_dtype(device)
        self.tokens = (
            self.config.gradient_accumulation_steps
            * recipe.data.micro_batch_size
            * recipe.data.sequence_length
        )
        self.peak_bytes = 0
        self._device, self._parks = device, parks and device.type == "cuda"
        packer = synthetic_batches(recipe, vocabulary)
        self._batches = cycle(
            [
                [packer.pack() for _ in range(self.config.gradient_accumulation_steps)]
                for _ in range(_STEPS)
            ]
        )
        self._model = prepare_model(recipe, vocabulary, world)
        self.parameters = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        self._monitor = LossMonitor(self.config, device)
        self._step = make_step(recipe, self._model, world, self._monitor)
        self._window = MetricsWindow(recipe, self._model, self.flops_per_token, world)
        compiled = self.config.compile and can_compile(device)
        self._with_statistics = self._step.objective
        self._without_statistics = next_token_objective(
            self.config.z_loss, compiled, record_selection=False
        )

    def __enter__(self) -> "_Runner":
        self._move(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._parks:
            self._move(torch.device("cpu"))

    def train(self) -> None:
        """A step that keeps statistics, between two log records."""
        self._take_step(None)

    def train_without_statistics(self) -> None:
        """A step without statistics of the routers."""
        self._step.objective = self._without_statistics
        self._take_step(None)
        self._step.objective = self._with_statistics

    def train_and_log(self) -> None:
        """A step that ends with a log record."""
        collected = Statistics(self._model)
        norm = self._take_step(collected)
        shared = {"norm": norm, **self._monitor.first_fault}
        self._window.start_record({"step": 1}, shared, collected.sums)
        self._window.finish_record()

    def timed(self, job: Job, cpu_time: bool) -> float:
        """Seconds of a job, on the device."""
        with self:
            return seconds(job, clock_of(cpu_time), self._device)

    def warm_up(self, jobs: list[Job], times: int) -> None:
        """Compile, warm up, and find the peak memory of a step."""
        try:
            for job in jobs * (1 + times):
                job()
            self.peak_bytes = self._held() + allocated_peak(self.train, self._device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.name}: a step needs more memory than the device has; "
                "lower data.micro_batch_size, or leave this recipe out"
            ) from error

    def _take_step(self, collected: Statistics | None) -> Tensor:
        sums, norm = self._step(next(self._batches), _RATE, collected)
        self._window.add(sums, self.tokens, 0.0)
        return norm

    def _held(self) -> int:
        """Bytes of weights, buffers and optimizer."""
        held = [*self._model.parameters(), *self._model.buffers()]
        held += [t for state in self._step.optimizer.state.values() for t in state.values()]
        return sum(t.untyped_storage().nbytes() for t in held)

    def _move(self, device: torch.device) -> None:
        self._model.to(device)
        for state in self._step.optimizer.state.values():
            for key, value in state.items():
                state[key] = value.to(device)


def _runners(
    recipes: Mapping[str, Recipe],
    device: torch.device,
    sizes: Sizes,
    quiet: bool,
    jobs: tuple[str, ...] = ("train",),
) -> list[_Runner]:
    """Everything built, compiled and warmed up."""
    runners = []
    with show_progress("warming up", len(recipes), quiet) as report:
        for name, recipe in recipes.items():
            with _Runner(name, recipe, device, parks=len(recipes) > 1) as runner:
                runner.warm_up([getattr(runner, job) for job in jobs], sizes.warm_up)
            runners.append(runner)
            report(len(runners), name)
    return runners
