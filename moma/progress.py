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

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_LINES and done != self.total:
            return
        self.last = now
        part = f"{done}/{self.total}" if self.total else str(done)
        line = f"{self.title}: {part} after {now - self.start:.0f} s  {note}"
        print(line, file=sys.stderr, flush=True)
