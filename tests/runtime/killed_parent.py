"""A process that is killed, and the workers that it started."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

WAIT = """
import multiprocessing, time
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
time.sleep(60)
"""


def assert_workers_end_with_parent(start: str, expected: int) -> None:
    """Kill a process, and wait until the workers that its code started have ended.

    Args:
        start: Python code that starts the workers.
        expected: how many they are.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", start + WAIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        assert len(workers) == expected and all(is_alive(worker) for worker in workers)
        parent.kill()
    for _ in range(100):
        if not any(is_alive(worker) for worker in workers):
            return
        time.sleep(0.1)
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    pytest.fail("a worker outlived its process")


def is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
