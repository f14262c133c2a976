"""Images read ahead, in worker processes where that pays, and handed on in order.

    items → images in tasks of a few → worker processes → pixels, in the order of the items
          → everything else passes through, in its place

A worker is a Python process of its own that reads tasks from its standard input and answers on its
standard output. It ends with its input: when this process ends, however it ends, so do they.
"""

import hashlib
import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from moma.data.documents import ImageRef
from moma.errors import UserError

# A worker takes about a second to start: sources that are read faster need none.
SECONDS_BEFORE_WORKERS = 3.0
TASK_IMAGES = 4
TASKS_AHEAD = 4  # of each worker

Shape = Callable[[Image.Image], np.ndarray]


class Pixels(NamedTuple):
    """An image that was read.

    Attributes:
        digest: equal for equal values.
        values: what the shape function made of it.
    """

    digest: bytes
    values: np.ndarray


class ImageReader:
    """Reads images in order; a context manager that ends its worker processes.

    The first seconds are read in this process, so that small sources do not wait for workers. What
    comes out depends neither on that nor on the number of workers. At most `TASKS_AHEAD` tasks of
    each worker are on their way.
    """

    def __init__(
        self, shape: Shape, workers: int, patience: float = SECONDS_BEFORE_WORKERS
    ) -> None:
        """Set up the reader; nothing is started yet.

        Args:
            shape: decoded image → array; runs in the workers, so it must be picklable.
            workers: most processes; 0 reads everything here.
            patience: seconds of reading in this process before workers are started.
        """
        self._shape, self._most, self._patience = shape, workers, patience
        self._spent = 0.0
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def read(self, items: Iterable[Any]) -> Iterator[Any]:
        """Read the images among the items, in order.

        Yields:
            For a `Image`, its `Pixels`, or the `UserError` that says why it cannot be read;
            every other item as it is.

        Raises:
            UserError: a worker process died.
        """
        ahead: deque[Callable[[], list[Any]]] = deque()
        for task in _tasks(items):
            ahead.append(self._start(task))
            # One item ahead also without workers: its texts are encoded meanwhile.
            while len(ahead) > max(1, TASKS_AHEAD * len(self._workers)):
                yield from ahead.popleft()()
        while ahead:
            yield from ahead.popleft()()

    def _start(self, task: list[Any]) -> Callable[[], list[Any]]:
        """Begin a task, if a worker can; returns what gives its outcome."""
        if not isinstance(task[0], ImageRef):
            return lambda: task
        if self._threads is None and self._most and self._spent >= self._patience:
            self._start_workers()
        if self._threads is None:
            return partial(self._read_here, task)
        return self._threads.submit(self._ask, task).result

    def _start_workers(self) -> None:
        self._workers = [_Worker(self._shape) for _ in range(self._most)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(self._workers))

    def _read_here(self, images: list[ImageRef]) -> list[Pixels | UserError]:
        began = time.monotonic()
        outcome = _read(images, self._shape)
        self._spent += time.monotonic() - began
        return outcome

    def _ask(self, images: list[ImageRef]) -> list[Pixels | UserError]:
        """Let an idle worker read; here, if the images cannot travel. Runs in a thread."""
        try:
            task = pickle.dumps(images)
        except (pickle.PicklingError, AttributeError, TypeError):
            return _read(images, self._shape)
        worker = self._idle.get()
        try:
            answer = worker.ask(task)
        finally:
            self._idle.put(worker)
        return _read(images, self._shape) if answer is None else answer


class _Worker:
    """A process that reads images."""

    def __init__(self, shape: Shape) -> None:
        # The same modules as here; a session of its own, so that Ctrl-C is this process's affair.
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        pickle.dump(shape, self._process.stdin)  # type: ignore[arg-type]

    def ask(self, task: bytes) -> list[Pixels | UserError] | None:
        """What the worker read; None if it does not know the images' code."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(task, self._process.stdin)
            self._process.stdin.flush()
            answer: list[Pixels | UserError] | None = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"a process that reads images died (status {self._process.poll()}), perhaps for "
                "want of memory; run the same command again, with --workers 0 if it happens again"
            ) from error
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Leave nothing behind: no zombie, no open pipe."""
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was still to be sent
                pipe.close()  # type: ignore[union-attr]


def serve() -> None:
    """Be a worker: read tasks from standard input until it ends."""
    tasks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    shape = pickle.load(tasks)
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        pickle.dump(_answer(task, shape), answers)
        answers.flush()


def _answer(task: bytes, shape: Shape) -> list[Pixels | UserError] | None:
    try:
        images = pickle.loads(task)
    except (AttributeError, ImportError):  # a class of the other process's `__main__`, say
        return None
    return _read(images, shape)


def _read(images: list[ImageRef], shape: Shape) -> list[Pixels | UserError]:
    return [_read_one(image, shape) for image in images]


def _read_one(image: ImageRef, shape: Shape) -> Pixels | UserError:
    try:
        values = shape(image.read())
    except UserError as error:
        return error
    digest = hashlib.sha256(f"{values.shape} {values.dtype}".encode() + values.tobytes())
    return Pixels(digest.digest(), values)


def _tasks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Images that follow one another, a few together; everything else alone."""
    images: list[Any] = []
    for item in items:
        if isinstance(item, ImageRef):
            images.append(item)
        if images and (len(images) == TASK_IMAGES or not isinstance(item, ImageRef)):
            yield images
            images = []
        if not isinstance(item, ImageRef):
            yield [item]
    if images:
        yield images
