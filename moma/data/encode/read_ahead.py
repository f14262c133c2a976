"""Images read ahead, in worker processes if that pays, and yielded in order."""

import hashlib
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import groupby, islice
from typing import Any, NamedTuple, Self

import numpy as np
from PIL import Image

from moma.data.documents import ImageRef
from moma.errors import StorageError, UserError
from moma.runtime.processes import explain_lost_worker, start_pool

# A worker takes about a second to start: sources that are read faster do not need any.
SECONDS_BEFORE_WORKERS = 3.0
TASK_IMAGES = 4
TASKS_PER_WORKER = 4  # submitted, not yet yielded

Preprocess = Callable[[Image.Image], np.ndarray]


class Pixels(NamedTuple):
    """An image that was read.

    Attributes:
        fingerprint: equal for equal values.
        values: the preprocessed image.
    """

    fingerprint: bytes
    values: np.ndarray


class ImageReader:
    """Reads images in order; a context manager that ends its worker processes.

    The output does not depend on the number of workers.
    """

    def __init__(
        self, preprocess: Preprocess, workers: int, seconds: float = SECONDS_BEFORE_WORKERS
    ) -> None:
        """Set up the reader; no process is started yet.

        Args:
            preprocess: decoded image → array; runs in the workers, so it must be picklable.
            workers: maximum processes; 0 reads everything in this one.
            seconds: how long to read in this process before workers are started, so that small
                sources do not wait for them.
        """
        self._preprocess, self._workers, self._seconds = preprocess, workers, seconds
        self._seconds_read = 0.0
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def read(self, items: Iterable[Any]) -> Iterator[Any]:
        """Read the images among the items.

        Yields:
            `Pixels` for each `ImageRef`, or the `UserError` that says why it cannot be read; every
            other item unchanged.

        Raises:
            UserError: a worker process died, or the disk fails.
        """
        ahead: deque[Callable[[], list[Any]]] = deque()
        for task in _tasks(items):
            ahead.append(self._start(task))
            # One task ahead without workers, too: its texts are tokenized meanwhile.
            workers = self._workers if self._pool else 0
            while len(ahead) > max(1, TASKS_PER_WORKER * workers):
                yield from ahead.popleft()()
        while ahead:
            yield from ahead.popleft()()

    def _start(self, task: list[Any]) -> Callable[[], list[Any]]:
        """Start a task in a worker if possible; returns a function that returns its result."""
        if not isinstance(task[0], ImageRef):
            return lambda: task
        if self._pool is None and self._workers and self._seconds_read >= self._seconds:
            self._pool = start_pool(self._workers)
        here = partial(self._read_here, task)
        if self._pool is None:
            return here
        try:
            pickled = pickle.dumps((task, self._preprocess))
        except (pickle.PicklingError, AttributeError, TypeError):
            return here
        with explain_lost_worker("reads documents"):
            future = self._pool.submit(_read_pickled, pickled)

        def result() -> list[Any]:
            with explain_lost_worker("reads documents"):
                found = future.result()
            return here() if found is None else found

        return result

    def _read_here(self, images: list[ImageRef]) -> list[Pixels | UserError]:
        begin = time.monotonic()
        result = _read_all(images, self._preprocess)
        self._seconds_read += time.monotonic() - begin
        return result


def _read_pickled(task: bytes) -> list[Pixels | UserError] | None:
    """Read images in a worker; None if it cannot import their code, of a user's script, say."""
    try:
        images, preprocess = pickle.loads(task)
    except (AttributeError, ImportError):
        return None
    return _read_all(images, preprocess)


def _read_all(images: list[ImageRef], preprocess: Preprocess) -> list[Pixels | UserError]:
    found: list[Pixels | UserError] = []
    for image in images:
        try:
            values = preprocess(image.read())
        except StorageError:
            raise
        except UserError as error:
            found.append(error)
            continue
        hashed = hashlib.sha256(f"{values.shape} {values.dtype}".encode() + values.tobytes())
        found.append(Pixels(hashed.digest(), values))
    return found


def _tasks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Group consecutive images; every other item is a task of its own."""
    for are_images, group in groupby(items, lambda item: isinstance(item, ImageRef)):
        while task := list(islice(group, TASK_IMAGES if are_images else 1)):
            yield task
