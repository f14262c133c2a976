"""Progress and log messages on standard error."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

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
    """Show progress toward `total` units (None: unknown) on standard error.

    A terminal gets a live bar; anything else a line every `SECONDS_BETWEEN_LINES`.
    """
    if quiet:
        yield lambda done, note="": None
    elif sys.stderr.isatty():
        with _bar() as bar:
            task, estimate = bar.add_task(title, total=total, note="", left=""), _Estimate(total)
            yield lambda done, note="": bar.update(
                task, completed=done, note=note, left=estimate.time_left(done)
            )
    else:
        yield _Lines(title, total)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )


class _Estimate:
    """Estimates the remaining time by the speed after the first units.

    The first report may count units of an earlier process, and the first units include the time to
    compile.
    """

    def __init__(self, total: int | None):
        self.total = total
        self.first: int | None = None
        self.base: tuple[int, float] | None = None

    def time_left(self, done: int) -> str:
        """Note a report and describe the remaining time; empty if it cannot be estimated."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if self.base is None and done > self.first:
            self.base = done, now
        before, start = self.base or (done, now)
        if not self.total or not before < done < self.total:
            return ""
        return f"{(now - start) * (self.total - done) / (done - before):.0f} s left"


class _Lines:
    """Prints a line at most every `SECONDS_BETWEEN_LINES`, and one at the end."""

    def __init__(self, title: str, total: int | None):
        self.title, self.total, self.estimate = title, total, _Estimate(total)
        self.start = self.last = time.monotonic()
        self.final_note: str | None = None

    def __call__(self, done: int, note: str = "") -> None:
        now, left = time.monotonic(), self.estimate.time_left(done)
        if done == self.total:
            if note == self.final_note:
                return
            self.final_note = note
        elif now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        part = f"{done}/{self.total}" if self.total else str(done)
        seconds = ", ".join(filter(None, [f"{now - self.start:.0f} s", left]))
        print(f"{self.title}: {part} after {seconds}  {note}", file=sys.stderr, flush=True)
