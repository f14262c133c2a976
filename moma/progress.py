"""Progress of long work: a live bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Report(Protocol):
    """Tells how far the work is."""

    def __call__(self, done: int, note: str = "") -> None:
        """`done` units of the total are finished; `note` is shown beside them."""
        ...


@contextmanager
def show_progress(title: str, total: int | None, quiet: bool = False) -> Iterator[Report]:
    """Show on standard error how many of `total` (None: unknown) are done, unless `quiet`."""
    if quiet:
        yield lambda done, note="": None
    elif sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=note)
    else:
        yield _Lines(title, total)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


class _Lines:
    """Prints at most one line in `SECONDS_BETWEEN_LINES`, and one at the end."""

    def __init__(self, title: str, total: int | None):
        self.title, self.total = title, total
        self.start = self.last = time.monotonic()
        self.first: int | None = None  # what was done before this process, or at its first report

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.last < SECONDS_BETWEEN_LINES and done != self.total:
            return
        self.last = now
        part = f"{done}/{self.total}" if self.total else str(done)
        left = self._left(done, now - self.start)
        line = f"{self.title}: {part} after {now - self.start:.0f} s{left}  {note}"
        print(line, file=sys.stderr, flush=True)

    def _left(self, done: int, seconds: float) -> str:
        """How long the rest takes at the speed so far, where that can be told."""
        if not self.total or self.first is None or not self.first < done < self.total:
            return ""
        return f", {seconds * (self.total - done) / (done - self.first):.0f} s left"
