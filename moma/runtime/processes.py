"""Processes that work for this one."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from types import ModuleType


def start_pool(workers: int) -> ProcessPoolExecutor:
    """Start worker processes, all of them now."""
    with without_main_module():
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_set_up_worker)
        for _ in range(workers):
            pool.submit(int)
    return pool


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
