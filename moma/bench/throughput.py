"""Speed of the trainer's step: tokens per second, model FLOPs utilization (MFU) and memory.

    for each recipe: synthetic documents → packing → steps of `moma train`, compiled, warmed up
    in every round:  one step of each recipe       → medians, and ratios round by round

`bench_statistics` measures the cost of logging in the same way.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from operator import sub
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.bench.timing import Job, interleaved, median_ratio, seconds, spread
from moma.errors import UserError
from moma.model.routing import Routing
from moma.progress import show_progress
from moma.recipe import read_recipe, shipped_recipe
from moma.runtime.peak import allocated_peak, peak_flops
from moma.runtime.world import World, can_compile, local_device
from moma.train.metrics import MetricsWindow
from moma.train.monitor import LossMonitor
from moma.train.recipe import Recipe
from moma.train.stages import flops_per_token, make_step, prepare_model
from moma.train.statistics import Statistics
from moma.train.step import next_token_loss

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
        warm_up: steps of each recipe before, the first of which compiles.
        cpu_time: whether to measure CPU time, summed over threads, instead of wall-clock time.
    """

    repeats: int = 11
    warm_up: int = 2
    cpu_time: bool = False


def table2(
    row: str, overrides: Sequence[str] = (), only: Sequence[str] = TABLE2
) -> dict[str, Recipe]:
    """Return recipes for the architectures of Table 2 at one model size, about equal in FLOPs.

    Args:
        row: model size of Table 1, or `256`.
        only: some of the architectures; `dense`, the baseline, is always added.

    Raises:
        UserError: there is no such row or architecture, or an override is invalid.
    """
    if row not in ROWS:
        raise UserError(f"--row {row}: use {', '.join(ROWS)}")
    if unknown := [name for name in only if name not in TABLE2]:
        raise UserError(f"--only {unknown[0]}: use {', '.join(TABLE2)}")
    without_depth, with_depth = map(shipped_recipe, ROWS[row])
    return {
        name: read_recipe(
            Recipe,
            with_depth if name.startswith("mod") else without_depth,
            [f"model.groups={name}", *overrides],
        )
        for name in TABLE2
        if name in ("dense", *only)
    }


def named(paths: Sequence[Path], overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """Read recipes, by the names of their files.

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
        For each the figures that `docs/bench.md` lists. `ratio_to_` followed by `baseline` is the
        median of the ratios to the first recipe's speed, round by round.

    Raises:
        UserError: a recipe cannot be packed, or needs more memory than the device has.
    """
    device = local_device()
    runners = _runners(recipes, device, sizes, quiet)
    peak_of = dict.fromkeys((runner.dtype for runner in runners), 0.0)

    def measure_peak(done: int) -> None:
        for dtype, best in peak_of.items():
            peak_of[dtype] = max(best, peak_flops(device, dtype))
        report(done)

    timed = [partial(runner.time_job, runner.train, sizes.cpu_time) for runner in runners]
    with show_progress("rounds", sizes.repeats, quiet) as report:
        times = interleaved(timed, sizes.repeats, measure_peak)
    speeds = [[r.tokens / each for each in own] for r, own in zip(runners, times, strict=True)]
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
    runners = _runners(recipes, local_device(), sizes, quiet, with_statistics=True)
    timed = [
        partial(runner.time_job, job, sizes.cpu_time) for runner in runners for job in runner.jobs
    ]
    with show_progress("rounds", sizes.repeats, quiet) as report:
        times = iter(interleaved(timed, sizes.repeats, report))
    by_runner = zip(runners, times, times, times, strict=True)
    return [_overhead(runner, *found) for runner, *found in by_runner]


def _overhead(
    runner: "_Runner", bare: list[float], kept: list[float], logged: list[float]
) -> dict[str, Any]:
    step, keeping, logging = map(
        statistics.median, (bare, map(sub, kept, bare), map(sub, logged, kept))
    )
    return {
        "name": runner.name,
        "step_seconds": step,
        "keeping": keeping,
        "logging": logging,
        "overhead": (keeping + logging / runner.config.log_every) / step,
    }


def _runners(
    recipes: Mapping[str, Recipe],
    device: torch.device,
    sizes: Sizes,
    quiet: bool,
    with_statistics: bool = False,
) -> list["_Runner"]:
    """Build, compile and warm up all recipes."""
    runners = []
    with show_progress("compiling, warming up", len(recipes), quiet) as report:
        for name, recipe in recipes.items():
            runner = _Runner(name, recipe, device, offloads=len(recipes) > 1)
            runner.warm_up(runner.jobs if with_statistics else [runner.train], sizes.warm_up)
            runners.append(runner)
            report(len(runners), name)
    return runners


class _Runner:
    """A recipe's model, with the step of `moma train`, on synthetic micro-batches.

    Attributes:
        jobs: a step without statistics of the routers, one that keeps them, one that logs them.
    """

    def __init__(self, name: str, recipe: Recipe, device: torch.device, offloads: bool):
        recipe = recipe.model_copy(update={"stage": "pretrain", "from_": None})
        vocabulary, world = synthetic_vocabulary(recipe), World(device)
        self.name, self.config = name, recipe.pretrain
        self.flops_per_token = flops_per_token(recipe, vocabulary)
        self.dtype = recipe.engine.compute_dtype(device)
        micro_batches = self.config.gradient_accumulation_steps
        self.tokens = micro_batches * recipe.data.micro_batch_size * recipe.data.sequence_length
        self.peak_bytes = 0
        self.jobs: list[Job] = [
            partial(self.train, keep_statistics=False),
            self.train,
            partial(self.train, log=True),
        ]
        # On a GPU, the weights of the other recipes wait in host memory.
        self._device, self._offloads = device, offloads and device.type == "cuda"
        pack = synthetic_batches(recipe, vocabulary).pack
        self._batches = cycle([[pack() for _ in range(micro_batches)] for _ in range(_STEPS)])
        self._model = prepare_model(recipe, vocabulary, world)
        self.parameters = sum(p.numel() for p in self._model.parameters() if p.requires_grad)
        self._monitor = LossMonitor(self.config, device)
        self._step = make_step(recipe, self._model, world, self._monitor)
        self._window = MetricsWindow(recipe, self._model, self.flops_per_token, world)
        compiled = self.config.compile and can_compile(device)
        bare = next_token_loss(self.config.z_loss, compiled, Routing())
        self._loss_functions = {True: self._step.loss_function, False: bare}

    def train(self, keep_statistics: bool = True, log: bool = False) -> None:
        """Take a step.

        Args:
            keep_statistics: whether to keep statistics of the routers for the next log record.
            log: whether to end with a log record.
        """
        self._step.loss_function = self._loss_functions[keep_statistics]
        collected = Statistics(self._model) if log else None
        sums, norm = self._step(next(self._batches), _RATE, collected)
        self._window.add(sums, self.tokens, 0.0)
        if collected is not None:
            shared = {"norm": norm, **self._monitor.first_fault}
            self._window.start_record({"step": 1}, shared, collected.sums)
            self._window.finish_record()

    def time_job(self, job: Job, cpu_time: bool) -> float:
        """Measure a job, on the device."""
        with self._on_device():
            return seconds(job, cpu_time, self._device)

    def warm_up(self, jobs: Sequence[Job], times: int) -> None:
        """Compile, warm up, and measure the peak memory of a step."""
        try:
            with self._on_device():
                for job in [*jobs] * (1 + times):
                    job()
                self.peak_bytes = self._held() + allocated_peak(self.train, self._device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.name}: a step needs more memory than the device has; "
                "lower data.micro_batch_size, or leave this recipe out"
            ) from error

    def _held(self) -> int:
        """Bytes of weights, buffers and optimizer state."""
        held = [*self._model.parameters(), *self._model.buffers()]
        held += [tensor for state in self._optimizer_states() for tensor in state.values()]
        return sum(t.untyped_storage().nbytes() for t in held)

    def _optimizer_states(self) -> list[dict[str, Tensor]]:
        """The state of each parameter."""
        return [state for each in self._step.optimizers for state in each.state.values()]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        self._move(self._device)
        yield
        if self._offloads:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        self._model.to(device)
        for state in self._optimizer_states():
            for key, value in state.items():
                state[key] = value.to(device)
