"""SIGTERM, SIGINT, and what one rank alone cannot do: every rank leaves at the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed

from moma.errors import SharedStorageError, StoppedError, StorageError
from moma.runtime.world import World

# Told between ranks as if it were a signal; above all of them.
_PROBLEM = 1000


class Interruption:
    """Whether somebody asked the job to stop, agreed between all ranks.

    `problem` is what this rank could not write by itself, if anything: it is told as signals are.
    Asked once a step by every rank. What a rank was told travels while the next step computes, so
    nobody waits for it: all ranks learn of a signal one step after it came.
    """

    def __init__(self, world: World):
        self._world = world
        self._received = 0
        self.problem: StorageError | None = None
        self._before: dict[int, Any] = {}
        self._underway: tuple[distributed.Work, Tensor] | None = None

    def listen(self) -> None:
        """Take note of signals from here on: before, there is nothing to save."""
        with suppress(ValueError):  # outside of a main thread, which alone may
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """Take note of a signal; a second Ctrl-C ends the process at once.

        A second SIGTERM does not: launchers pass one on that this process has got already, and
        send SIGKILL when they mean it.
        """
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> str | None:
        """The name of the signal that a rank received before its last step but one, if any.

        Raises:
            SharedStorageError: a rank had a problem.
        """
        own = _PROBLEM if self.problem else self._received
        if self._world.signals is None:
            return self._name(own)
        told = self._finish()
        highest = torch.tensor([own])
        work = distributed.all_reduce(
            highest, distributed.ReduceOp.MAX, group=self._world.signals, async_op=True
        )
        self._underway = work, highest
        return self._name(told)

    def close(self) -> None:
        """Wait for what is still on its way."""
        self._finish()

    def give_back(self, stopped: bool = False) -> None:
        """Leave signals to whom they belonged; while a process stops, SIGTERM tells it nothing."""
        for number, handler in self._before.items():
            ignored = stopped and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def _finish(self) -> int:
        if self._underway is None:
            return 0
        work, highest = self._underway
        self._underway = None
        work.wait()
        return int(highest)

    def _name(self, number: int) -> str | None:
        if number == _PROBLEM:
            raise SharedStorageError(str(self.problem or "another rank cannot write"))
        return signal.Signals(number).name if number else None


@contextmanager
def interruption(world: World) -> Iterator[Interruption]:
    """SIGTERM and SIGINT of a piece of work, from `listen` on."""
    asked, stopped = Interruption(world), False
    try:
        yield asked
        asked.close()
    except StoppedError:  # all ranks leave together, so that nothing need be left on its way
        stopped = True
        asked.close()
        raise
    finally:
        asked.give_back(stopped)
