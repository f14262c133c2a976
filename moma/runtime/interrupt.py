"""SIGTERM, SIGINT and write errors of single ranks, so that all ranks stop after the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed

from moma.errors import SharedStorageError, StoppedError, StorageError
from moma.runtime.world import World

# Sent between ranks in place of a signal number, and greater than all of them.
_STORAGE_ERROR = 1000


class Interruption:
    """A request to stop, agreed upon by all ranks, which call `poll` once per step.

    The ranks' values are reduced while the next step is computed, so that no rank waits: all of
    them learn of a signal one step after it arrived.
    """

    def __init__(self, world: World):
        self._world = world
        self._received = 0
        self._handlers: dict[int, Any] = {}
        self._pending: tuple[distributed.Work, Tensor] | None = None

    def install_handlers(self) -> None:
        """Record signals from now on; before, there is nothing to save."""
        with suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Record a signal; a second Ctrl-C ends the process at once.

        A second SIGTERM does not: launchers forward one that this process has already received,
        and send SIGKILL to end it.
        """
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def poll(self, storage_error: StorageError | None = None) -> str | None:
        """Return the signal that any rank had received one call ago.

        Args:
            storage_error: a write error of this rank, if there is one.

        Raises:
            SharedStorageError: a rank had a write error one call ago.
        """
        own = _STORAGE_ERROR if storage_error else self._received
        if self._world.signals is None:
            return _signal_name(own, storage_error)
        number = self.finish()
        highest = torch.tensor([own])
        work = distributed.all_reduce(
            highest, distributed.ReduceOp.MAX, group=self._world.signals, async_op=True
        )
        self._pending = work, highest
        return _signal_name(number, storage_error)

    def finish(self) -> int:
        """Wait for the pending reduction and return its result, 0 if there is none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return 0
        work, highest = pending
        work.wait()
        return int(highest)

    def restore_handlers(self, stopped: bool = False) -> None:
        """Restore the signal handlers; a process that is stopping ignores further SIGTERMs."""
        for number, handler in self._handlers.items():
            ignored = stopped and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ignored else handler)


@contextmanager
def interruption(world: World) -> Iterator[Interruption]:
    """Handle SIGTERM and SIGINT inside the context, once `install_handlers` is called."""
    request, stopped = Interruption(world), False
    try:
        yield request
        request.finish()
    except StoppedError:  # all ranks stop together, so that the reduction can be completed
        stopped = True
        request.finish()
        raise
    finally:
        request.restore_handlers(stopped)


def _signal_name(number: int, storage_error: StorageError | None) -> str | None:
    if number == _STORAGE_ERROR:
        raise SharedStorageError(str(storage_error or "another rank cannot write"))
    return signal.Signals(number).name if number else None
