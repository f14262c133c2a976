"""Progress and log messages on standard error."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class _MessageHandler(logging.Handler):
    """Prints `moma: message` to the current standard error, which a progress bar may redirect."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"moma: {self.format(record)}", file=sys.stderr, flush=True)


def show_log_messages() -> None:
    """Print the messages of all `moma` loggers as plain lines on standard error."""
    logger = logging.getLogger("moma")
    if not any(isinstance(handler, _MessageHandler) for handler in logger.handlers):
        logger.addHandler(_MessageHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False


class ProgressCallback(Protocol):
    """Reports progress."""

    def __call__(self, done: int, note: str = "") -> None:
        """Report that `done` units of the total are finished; `note` is shown beside them."""
        ...


@contextmanager
def show_progress(title: str, total: int | None, quiet: bool = False) -> Iterator[ProgressCallback]:
    """Show progress towards `total` units (None: unknown) on standard error.

    A terminal gets a live bar; anything else a line every `SECONDS_BETWEEN_LINES`.
    """
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
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )


class _Lines:
    """Prints a line at most every `SECONDS_BETWEEN_LINES`, and one at the end."""

    def __init__(self, title: str, total: int | None):
        self.title, self.total = title, total
        self.start = self.last = time.monotonic()
        self.first: int | None = None  # units done before this process, by its first report

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.last < SECONDS_BETWEEN_LINES and done != self.total:
            return
        self.last = now
        part = f"{done}/{self.total}" if self.total else str(done)
        remaining = self._remaining(done, now - self.start)
        line = f"{self.title}: {part} after {now - self.start:.0f} s{remaining}  {note}"
        print(line, file=sys.stderr, flush=True)

    def _remaining(self, done: int, seconds: float) -> str:
        """Estimated remaining time at the speed so far; empty if it cannot be estimated."""
        if not self.total or self.first is None or not self.first < done < self.total:
            return ""
        return f", {seconds * (self.total - done) / (done - self.first):.0f} s left"
