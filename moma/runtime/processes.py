"""Start worker processes, alone or as a pool, and end them with the process that started them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType

from moma.errors import UserError


def start_pool(workers: int) -> ProcessPoolExecutor:
    """Start worker processes, all of them now.

    They ignore Ctrl-C, which is left to this process, and end with it, even if it is killed.

    Args:
        workers: how many, at least 1.
    """
    with without_main_module():
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_set_up_worker)
        for _ in range(workers):
            pool.submit(int)
    return pool


@contextmanager
def explain_lost_worker(work: str) -> Iterator[None]:
    """Raise a `UserError` in place of the error about a process of a pool that died.

    Args:
        work: what the process does, such as `reads documents`; its command has `--processes`.
    """
    try:
        yield
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that {work} died, perhaps because memory ran out; run the same command "
            "again, with --processes 1 if it happens again"
        ) from error


@contextmanager
def without_main_module() -> Iterator[None]:
    """Start processes without the main module: importing it would run a user's script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def exit_with_parent() -> None:
    """End this process when its parent process ends, even if that is killed."""

    def wait_and_exit() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait_and_exit, name="exit with parent", daemon=True).start()


def _set_up_worker() -> None:
    """Leave Ctrl-C to the parent process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()
