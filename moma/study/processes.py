"""Runs a study in several processes, of this machine or of a Ray cluster.

Processes of a machine work alike: each trains, one after another, the runs that no other process
has locked, so that more machines may run the same study. On a Ray cluster each run is a task.
"""

import logging
import multiprocessing
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from moma.data.encode.prepare import prepare
from moma.data.outputs import mark_output
from moma.errors import StoppedError, UserError
from moma.evaluate.perplexity import evaluate
from moma.progress import show_log_messages, show_progress
from moma.runs import Run
from moma.runtime.processes import exit_with_parent
from moma.runtime.ray_cluster import connect_to_ray
from moma.runtime.world import World, local_device
from moma.study.grid import Study, StudyRun, run_unfinished
from moma.study.report import FILES
from moma.train.recipe import Recipe

_T = TypeVar("_T")
logger = logging.getLogger(__name__)

# Retries of a run whose machine fails or is preempted.
_MAX_RETRIES = 2
# Variables that the command sets for itself, and for the processes of a cluster.
_INHERITED = ("HF_UPDATE_DOWNLOAD_COUNTS", "THP_MEM_ALLOC_ENABLE")
_KILLED = (
    "a training process was killed, perhaps because memory ran out; the same command continues "
    "from its last checkpoint"
)


def run_study(
    study: Study, processes: int | None = None, ray: str | None = None, quiet: bool = False
) -> dict[str, str]:
    """Prepare the data, then train and measure every run that no other process does.

    Args:
        processes: number of processes; by default one for each GPU, or for each core.
        ray: address of the Ray cluster that trains, whose machines share the folders of data and
            runs; by default this machine.

    Returns:
        The messages of runs that cannot be trained, by their names. Other processes may still be
        at work on runs that are neither finished nor among these.

    Raises:
        UserError: a folder has a run of another recipe, a process was killed, or there is no such
            Ray cluster.
    """
    for run in study.runs:
        run.require_same_recipes()
    device = local_device()
    mark_output(study.path, "results", *(run.name for run in study.runs), *FILES)
    prepare(study.recipe, device, quiet)
    if ray is not None:
        return _run_on_ray(study, ray, processes, quiet)
    count = _process_count(study, processes or torch.cuda.device_count() or os.cpu_count() or 1)
    if count == 1:
        return run_unfinished(study.runs, evaluate, World(device), quiet=quiet)
    return _run_in_pool(study, count, quiet)


def _process_count(study: Study, processes: int) -> int:
    """At most as many processes as there are unfinished runs, but at least one."""
    return max(1, min(processes, len(study.runs) - len(study.finished().runs)))


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
    with _progress(study, quiet) as show:
        return _merge(run_in_processes(jobs, threads, show))


def _run_on_ray(study: Study, address: str, processes: int | None, quiet: bool) -> dict[str, str]:
    ray = connect_to_ray(address, logging_level=logging.ERROR, log_to_driver=not quiet)
    try:
        resources = ray.cluster_resources()
        gpus, cores = (int(resources.get(kind, 0)) for kind in ("GPU", "CPU"))
        needs = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        count = _process_count(study, processes or gpus or cores)
        logger.info(
            "%s: %d runs at a time, each on a %s", study.path, count, "GPU" if gpus else "core"
        )
        retries = {"max_retries": _MAX_RETRIES, "retry_exceptions": [StoppedError]}
        variables = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        work = ray.remote(**needs, **retries, runtime_env={"env_vars": variables})(_train_on_ray)

        def submit(run: StudyRun) -> Future[dict[str, str]]:
            return work.remote(run, os.getcwd()).future()

        unfinished = [partial(submit, run) for run in study.runs if run.read_result() is None]
        with _progress(study, quiet) as show:
            return _merge(_run_all(unfinished, count, show))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--ray {address}: {_KILLED} (Ray: {reason})") from error
    finally:
        ray.shutdown()


@contextmanager
def _progress(study: Study, quiet: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that shows the progress of a study."""
    with show_progress(f"study {study.path.name}", _steps(study), quiet) as report:

        def show() -> None:
            finished = len(study.finished().runs)
            report(_steps(study, done=True), f"{finished} of {len(study.runs)} runs")

        yield show


def _merge(found: Sequence[dict[str, str]]) -> dict[str, str]:
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
            return _run_all([partial(pool.submit, job) for job in jobs], len(jobs), show)
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise UserError(_KILLED) from error
            raise


def _run_all(
    submit: Sequence[Callable[[], Future[_T]]], limit: int, show: Callable[[], object]
) -> list[_T]:
    """Run jobs, at most `limit` at the same time, until all are done or one fails.

    Args:
        submit: each begins a job.
        limit: maximum number of jobs at the same time.
        show: called once a second, and when a job is done.

    Raises:
        Exception: that of the job that failed.
    """
    waiting, futures, running = deque(submit), list[Future[_T]](), set[Future[_T]]()
    while waiting or running:
        while waiting and len(running) < limit:
            futures.append(waiting.popleft()())
            running.add(futures[-1])
        done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()  # raises its error
        show()
    return [future.result() for future in futures]


def _begin(threads: int) -> None:
    """Prepare a new process."""
    show_log_messages()
    exit_with_parent()  # it must not write into a run that is started again
    torch.set_num_threads(threads)


def _work(study: Study, gpu: str | None) -> dict[str, str]:
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    return run_unfinished(study.runs, evaluate, World(local_device()))


def _train_on_ray(run: StudyRun, folder: str) -> dict[str, str]:
    show_log_messages()
    try:
        os.chdir(folder)  # to which paths are relative
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be entered on {socket.gethostname()} ({error.strerror}); call "
            "`moma study --ray` from a folder that all machines of the cluster share"
        ) from error
    return run_unfinished([run], evaluate, World(local_device()))


def _steps(study: Study, done: bool = False) -> int:
    """Optimizer steps of all runs, or those done."""
    found = 0
    for run in study.runs:
        for stage in run.stages:
            if isinstance(stage, Recipe):
                last = Run(stage.run).last_metric() if done else {"step": stage.stage_config.steps}
                found += last["step"] if last else 0
    return found
