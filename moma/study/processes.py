"""Runs a study in several processes of this machine; more machines may run the same study."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TypeVar

import torch

from moma.data.encode.prepare import prepare
from moma.data.encode.read_ahead import exit_with_parent
from moma.data.outputs import mark_output
from moma.errors import UserError
from moma.evaluate.perplexity import evaluate
from moma.progress import show_log_messages, show_progress
from moma.runs import Run
from moma.runtime.world import World, local_device
from moma.study.grid import Study, run_unfinished
from moma.study.results import FILES
from moma.train.recipe import Recipe

_T = TypeVar("_T")


def run_study(study: Study, processes: int | None = None, quiet: bool = False) -> dict[str, str]:
    """Prepare the data, then train and measure every run that no other process does.

    Args:
        study: the study.
        processes: number of processes; by default one for each GPU, or for each core.
        quiet: whether to hide the progress bar.

    Returns:
        The messages of runs that cannot be trained, by their names. Other processes may still be
        at work on runs that are neither finished nor among these.

    Raises:
        UserError: a folder has a run of another recipe, or a process was killed.
    """
    for run in study.runs:
        run.require_same_recipes()
    device = local_device()
    mark_output(study.path, "results", *(run.name for run in study.runs), *FILES)
    prepare(study.recipe, device, quiet)
    wanted = processes or torch.cuda.device_count() or os.cpu_count() or 1
    count = max(1, min(wanted, len(study.runs) - len(study.finished().runs)))
    if count == 1:
        return run_unfinished(study.runs, evaluate, World(device), quiet=quiet)
    return _run_in_pool(study, count, quiet)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def _run_in_pool(study: Study, count: int, quiet: bool) -> dict[str, str]:
    threads, gpus = max(1, (os.cpu_count() or 1) // count), visible_gpus()
    jobs = [
        partial(_work, study, gpus[number % len(gpus)] if gpus else None) for number in range(count)
    ]
    with show_progress(f"study {study.path.name}", _steps(study), quiet) as report:

        def show() -> None:
            finished = len(study.finished().runs)
            report(_steps(study, done=True), f"{finished} of {len(study.runs)} runs")

        found = run_in_processes(jobs, threads, show)
    return {name: message for failures in found for name, message in failures.items()}


def run_in_processes(
    jobs: Sequence[Callable[[], _T]], threads: int, show: Callable[[], object]
) -> list[_T]:
    """Train in new processes, which all end if one fails; their runs keep their last checkpoints.

    Args:
        jobs: what each process does; they are pickled.
        threads: number of threads of PyTorch in each.
        show: called once a second, and when a job is done.

    Raises:
        UserError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(jobs), context, _begin, (threads,)) as pool:
        try:
            futures = [pool.submit(job) for job in jobs]
            running = set(futures)
            while running:
                done, running = wait(running, timeout=1.0, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # raises its error
                show()
            return [future.result() for future in futures]
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a training process was killed, perhaps because memory ran out; the same "
                    "command continues from its last checkpoint"
                ) from error
            raise


def _begin(threads: int) -> None:
    """Prepare a new process."""
    show_log_messages()
    exit_with_parent()  # it must not write into a run that is started again
    torch.set_num_threads(threads)


def _work(study: Study, gpu: str | None) -> dict[str, str]:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    return run_unfinished(study.runs, evaluate, World(local_device()))


def _steps(study: Study, done: bool = False) -> int:
    """Optimizer steps of all runs, or those done."""
    found = 0
    for run in study.runs:
        for step in run.steps:
            if isinstance(step, Recipe):
                record = Run(step.run).last_metric() if done else {"step": step.stage_config.steps}
                found += record["step"] if record else 0
    return found
