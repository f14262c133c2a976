"""Running the tasks of a job on a Ray cluster, whose machines share the folders of data.

Ray tasks read and tokenize. Where the cluster has GPUs, an actor on each holds a codec, which
encodes the images of several parts in one batch; otherwise each task has a codec. Ray runs a task
again whose process or machine is lost; it continues from the files that are on disk.
"""

import asyncio
import gc
import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch

from moma.data.encode.executors import ATTEMPTS, Report, lost_part
from moma.data.encode.part_writer import read_records
from moma.data.encode.worker import Encoded, Job, Task, Worker, encode_together, local_worker
from moma.data.shards import PartRecord
from moma.runtime.ray_cluster import connect_to_ray

# Tasks that are submitted for each core of the cluster: the next ones start at once.
_TASKS_PER_CORE = 2


class RayCluster:
    """Runs tasks on a Ray cluster."""

    def __init__(
        self, job: Job, address: str, processes: int | None = None, codec_actors: int | None = None
    ) -> None:
        """Connect to the cluster.

        Args:
            address: as for `connect_to_ray`, whose errors are raised.
            processes: maximum tasks at the same time; by default as many as there are cores.
            codec_actors: actors with a codec; by default as many as there are GPUs.
        """
        ray = connect_to_ray(address, logging_level=logging.ERROR, log_to_driver=False)
        self._ray, self._job = ray, job
        gpus = int(ray.cluster_resources().get("GPU", 0))
        self._processes = processes
        self._actors = (
            0 if job.image_size is None else gpus if codec_actors is None else codec_actors
        )
        self._gpus_per_actor = 1 if gpus else 0

    def run(self, tasks: Sequence[Task], report: Report) -> None:
        """See `Executor`.

        Raises:
            UserError: the processes or machines that encode a part were lost several times.
        """
        ray = self._ray
        try:
            self._run(tasks, report)
        finally:
            ray.shutdown()

    def _run(self, tasks: Sequence[Task], report: Report) -> None:
        ray = self._ray
        job = ray.put(Shared(self._job, os.getcwd(), uuid4().hex))
        codec = ray.remote(
            num_cpus=0, num_gpus=self._gpus_per_actor, max_restarts=-1, max_task_retries=-1
        )
        codecs = [codec(BatchingCodec).remote(job) for _ in range(self._actors)]
        encode = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(_encode)
        waiting, running = deque(tasks), dict[Any, Task]()
        while waiting or running:
            limit = self._limit()
            while waiting and len(running) < limit:
                task = waiting.popleft()
                folder = self._job.sources[task.source].unfinished_folder
                report(Encoded(task, sum(read_records(folder, task.number), PartRecord())))
                actor = codecs[task.number % len(codecs)] if codecs else None
                running[encode.remote(job, task, actor)] = task
            (done, *_), _ = ray.wait([*running])
            task = running.pop(done)
            try:
                report(ray.get(done))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise lost_part(task) from error

    def _limit(self) -> int:
        """Tasks that are submitted at the same time: more as machines join the cluster."""
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        return self._processes or _TASKS_PER_CORE * max(1, cores)


class Shared(NamedTuple):
    """What all tasks share: the job, the folder that paths are relative to, and a unique name."""

    job: Job
    folder: str
    name: str


def _encode(shared: Shared, task: Task, actor: Any) -> Encoded:
    """Encode a part in a process of the cluster."""
    worker = _worker(shared, actor)
    records = worker.encode(task, lambda part: None)
    return Encoded(task, sum(records, PartRecord()), records, socket.gethostname())


_WORKERS: dict[str, Worker] = {}


def _worker(shared: Shared, actor: Any) -> Worker:
    """Return the worker of this process, which serves one task after another."""
    if shared.name not in _WORKERS:
        os.chdir(shared.folder)
        torch.set_num_threads(1)
        if actor is None:
            worker = local_worker(shared.job, torch.device("cpu"))
        else:
            worker = Worker(shared.job, _RemoteCodec(actor), codec_in_thread=True)
        gc.freeze()  # collections skip imported modules, as in a pool
        _WORKERS[shared.name] = worker
    return _WORKERS[shared.name]


class _RemoteCodec:
    """Encodes images with the codec of an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __call__(self, pixels: list[np.ndarray]) -> np.ndarray:
        """See `encode_images`."""
        import ray

        codes: np.ndarray = ray.get(self._actor.encode.remote(np.stack(pixels)))
        return codes


class BatchingCodec:
    """Encodes the images of all requests that wait at the same time in one call."""

    def __init__(self, shared: Shared) -> None:
        """Load the codec."""
        os.chdir(shared.folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._encode = shared.job.load_codec(device)
        self._waiting: list[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = []
        self._is_busy = False

    async def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Encode images, uint8 of shape [images, H, W, 3]; see `encode_images`."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, future))
        if not self._is_busy:
            await self._answer()
        codes: np.ndarray = await future
        return codes

    async def _answer(self) -> None:
        self._is_busy = True
        while self._waiting:
            requests, self._waiting = self._waiting, []
            pixels, futures = zip(*requests, strict=True)
            try:
                answers = await asyncio.to_thread(encode_together, self._encode, pixels)
            except Exception as error:
                for future in futures:
                    future.set_exception(error)
                continue
            for future, codes in zip(futures, answers, strict=True):
                future.set_result(codes)
        self._is_busy = False
