"""Processes forked from one that has imported everything: ranks over gloo, and `moma` commands."""

import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from moma.cli import main
from moma.runtime.world import join_world

multiprocessing.set_forkserver_preload(["tests.preloaded"])
FORKSERVER = multiprocessing.get_context("forkserver")


@contextmanager
def forked() -> Iterator[None]:
    """In this context, new processes of whatever kind are forked: they import nothing again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("multiprocessing.get_context", lambda method: FORKSERVER)
        yield


def run_rank(rank: int, ranks: int, port: int, job, *arguments) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with join_world() as world:
        job(world, *arguments)


def on_ranks(ranks: int, job, *arguments) -> None:
    """Call `job(world, *arguments)` on each of several ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (ranks, port, job, *arguments)
    multiprocessing.start_processes(run_rank, arguments, nprocs=ranks, start_method="forkserver")


def run_command(arguments: tuple[str, ...], out: Path, errors: Path) -> None:
    torch.set_num_threads(1)
    for descriptor, path in ((1, out), (2, errors)):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["moma", *arguments]
    main()


class Command:
    """A `moma` command in a process of its own, used like `subprocess.Popen`."""

    def __init__(self, folder: Path, *arguments: object):
        """Start the command; its output is written to files in `folder`."""
        self._files = folder / "stdout.txt", folder / "stderr.txt"
        target = (tuple(map(str, arguments)), *self._files)
        self._process = FORKSERVER.Process(target=run_command, args=target)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the command has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 500) -> tuple[str, str]:
        """Wait for the end; return standard output and standard error."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "the command has not ended"
        out, errors = (path.read_text() for path in self._files)
        return out, errors
