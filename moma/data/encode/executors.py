"""Running the tasks of a job: in this process, or on a pool of processes of this machine.

Where there are GPUs, each has one codec, in a thread of this process, which encodes the images of
several processes in one batch. On a CPU, each process has a codec.
"""

import gc
import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, Protocol

import numpy as np
import torch

from moma.data.encode.tokens import EncodeImages
from moma.data.encode.worker import Encoded, Job, Task, Worker, encode_together, local_worker
from moma.data.shards import PartRecord
from moma.errors import UserError
from moma.runtime.processes import exit_with_parent, without_main_module

# A part whose process died this often is given up.
ATTEMPTS = 3
# What a codec imports, which takes seconds.
_CODEC_MODULES = ("moma.tokenizers.image.vae", "vector_quantize_pytorch")
# Fewer bytes are read sooner in this process than other processes start.
MIN_POOL_BYTES = 2**26

Report = Callable[[Encoded], None]


class Executor(Protocol):
    """Runs tasks, in any order."""

    def run(self, tasks: Sequence[Task], report: Report) -> None:
        """Encode parts.

        Args:
            report: called with what is encoded of a part so far, and when it is complete.
        """
        ...


class InProcess:
    """Runs one task after another in this process; other processes read images ahead."""

    def __init__(self, job: Job, device: torch.device, processes: int) -> None:
        self._job, self._device, self._processes = job, device, processes

    def run(self, tasks: Sequence[Task], report: Report) -> None:
        """See `Executor`."""
        with (
            _collecting_new_garbage_only(),
            local_worker(self._job, self._device, self._processes - 1) as worker,
        ):
            for task in tasks:
                report(run_task(worker, task, report))


def run_task(worker: Worker, task: Task, report: Report) -> Encoded:
    """Encode a part; return its last report."""
    records = worker.encode(task, lambda part: report(Encoded(task, part)))
    return Encoded(task, sum(records, PartRecord()), records)


class LocalPool:
    """Runs tasks in processes of this machine.

    One that dies is replaced; its part continues from the files that are on disk.
    """

    def __init__(
        self,
        job: Job,
        processes: int,
        devices: Sequence[torch.device],
        shares_codec: bool,
    ) -> None:
        """Begin to import what the processes need, and start none of them yet.

        Args:
            devices: where the codecs are.
            shares_codec: whether processes share one codec for each device, in this process.
        """
        self._job, self._processes, self._devices = job, processes, devices
        self._codecs: list[_CodecThread] = []
        if shares_codec and job.image_size is not None:
            self._codecs = [_CodecThread(job.load_codec(device)) for device in devices]
        # Processes are forked from one that has only imported this: a new one starts at once.
        has_codecs = job.image_size is not None and not self._codecs
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *(_CODEC_MODULES if has_codecs else ())])
        with without_main_module():
            forkserver.ensure_running()

    def run(self, tasks: Sequence[Task], report: Report) -> None:
        """See `Executor`.

        Raises:
            UserError: a process died several times with the same part.
        """
        waiting, attempts = deque(tasks), Counter[Task]()
        for codec in self._codecs:
            codec.start()
        workers: dict[Connection, _Process] = {}
        for index in range(min(self._processes, len(waiting))):
            self._start(index, waiting.popleft(), workers)
        try:
            while workers:
                for connection in wait(workers):
                    assert isinstance(connection, Connection)
                    process = workers[connection]
                    try:
                        message = connection.recv()
                    except (EOFError, OSError):
                        del workers[connection]
                        process.end()
                        attempts[process.task] += 1
                        if attempts[process.task] == ATTEMPTS:
                            raise lost_part(process.task) from None
                        self._start(process.index, process.task, workers)
                        continue
                    if isinstance(message, BaseException):
                        raise message
                    report(message)
                    if message.records is None:
                        continue
                    if waiting:
                        process.give(waiting.popleft())
                    else:
                        del workers[connection]
                        process.end()
        finally:
            for process in workers.values():
                process.end()
            for codec in self._codecs:
                codec.stop()

    def _start(self, index: int, task: Task, workers: dict[Connection, "_Process"]) -> None:
        device = self._devices[index % len(self._devices)]
        images = self._codecs[index % len(self._codecs)].connect() if self._codecs else None
        threads = max(1, torch.get_num_threads() // self._processes)
        process = _Process(self._job, index, device, images, threads)
        process.give(task)
        workers[process.connection] = process


def lost_part(task: Task) -> UserError:
    """Return the error about a part whose process died too often."""
    return UserError(
        f"source '{task.source}', part {task.number}: the process that encodes it died "
        f"{ATTEMPTS} times, perhaps because memory ran out; run the same command again with fewer "
        "--processes"
    )


class _Process:
    """A process that encodes parts."""

    def __init__(
        self,
        job: Job,
        index: int,
        device: torch.device,
        images: Connection | None,
        threads: int,
    ) -> None:
        self.index = index
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        # The process that is forked may be older than variables such as credentials.
        arguments = (theirs, job, device, images, threads, dict(os.environ))
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        with without_main_module():
            self._process.start()
        theirs.close()  # the process's end is then the end of the connection
        if images is not None:
            images.close()

    def give(self, task: Task) -> None:
        """Let it encode a part."""
        self.task = task
        with suppress(OSError):  # it died: the next read finds that
            self.connection.send(task)

    def end(self) -> None:
        """End the process, which loses what it has not committed."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(
    connection: Connection,
    job: Job,
    device: torch.device,
    images: Connection | None,
    threads: int,
    environment: Mapping[str, str],
) -> None:
    """Encode the parts that arrive on a connection, until this process is killed."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
    torch.set_num_threads(threads)
    try:
        if images is None:
            worker = local_worker(job, device)
        else:
            worker = Worker(job, RemoteCodec(images), codec_in_thread=True)
        with _collecting_new_garbage_only(), worker:
            while True:
                connection.send(run_task(worker, connection.recv(), connection.send))
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))
        connection.send(error)


@contextmanager
def _collecting_new_garbage_only() -> Iterator[None]:
    """Let garbage collections skip the objects that exist, which are those of imported modules.

    There are hundreds of thousands, and token ids as lists cause many collections. In a forked
    process each would also copy the memory of these objects (docs/results/prepare.md). If the
    process has frozen objects already, nothing changes: only all at once can be unfrozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class RemoteCodec:
    """Encodes images with a codec at the other end of a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self, pixels: list[np.ndarray]) -> np.ndarray:
        """See `encode_images`."""
        self._connection.send(pixels)
        found = self._connection.recv()
        if isinstance(found, BaseException):
            raise found
        assert isinstance(found, np.ndarray)
        return found


class _CodecThread(Thread):
    """Encodes the images that processes send; those that wait at the same time in one call."""

    def __init__(self, encode: EncodeImages) -> None:
        super().__init__(name="codec", daemon=True)
        self._encode = encode
        self._connections: list[Connection] = []
        self._wake, self._woken = multiprocessing.Pipe()

    def connect(self) -> Connection:
        """Return a new connection for a process."""
        ours, theirs = multiprocessing.Pipe()
        self._connections.append(ours)
        self._wake.send(True)
        return theirs

    def stop(self) -> None:
        """End the thread."""
        self._wake.send(False)
        self.join()

    def run(self) -> None:
        """Answer requests until `stop`."""
        while True:
            requests: list[tuple[Connection, list[np.ndarray]]] = []
            for connection in wait([self._woken, *self._connections]):
                assert isinstance(connection, Connection)
                if connection is self._woken:
                    if not connection.recv():
                        return
                    continue
                try:
                    requests.append((connection, connection.recv()))
                except (EOFError, OSError):
                    self._connections.remove(connection)
            if requests:
                self._answer(requests)

    def _answer(self, requests: Sequence[tuple[Connection, list[np.ndarray]]]) -> None:
        answers: Iterable[Any]
        try:
            answers = encode_together(self._encode, (images for _, images in requests))
        except Exception as error:
            answers = [error] * len(requests)
        for (connection, _), answer in zip(requests, answers, strict=True):
            try:
                connection.send(answer)
            except OSError:
                self._connections.remove(connection)  # its process died


def local_devices(device: torch.device) -> list[torch.device]:
    """Return every GPU of this machine, or the CPU."""
    if device.type == "cpu":
        return [device]
    return [torch.device(device.type, index) for index in range(torch.cuda.device_count())]


def spare_cores() -> int:
    """Return the number of cores that this process may use in addition to its own."""
    try:
        return len(os.sched_getaffinity(0)) - 1
    except AttributeError:  # not on every system
        return (os.cpu_count() or 1) - 1
