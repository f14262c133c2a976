"""Runs a study in several processes of this machine; more machines may run the same study."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

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
    failures: dict[str, str] = {}
    with training_processes(count) as pool:
        jobs = [
            pool.submit(_work, study, threads, gpus[number % len(gpus)] if gpus else None)
            for number in range(count)
        ]
        with show_progress(f"study {study.path.name}", _steps(study), quiet) as report:
            running = set(jobs)
            while running:
                done, running = wait(running, timeout=1.0, return_when=FIRST_EXCEPTION)
                for job in done:
                    failures |= job.result()
                finished = len(study.finished().runs)
                report(_steps(study, done=True), f"{finished} of {len(study.runs)} runs")
    return failures


@contextmanager
def training_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """New processes, which all end if one fails; their runs keep their last checkpoints.

    Raises:
        UserError: a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=show_log_messages) as pool:
        try:
            yield pool
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "a training process was killed, perhaps because memory ran out; the same "
                    "command continues from its last checkpoint"
                ) from error
            raise


def _work(study: Study, threads: int, gpu: str | None) -> dict[str, str]:
    exit_with_parent()  # it must not write into a run that is started again
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
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
