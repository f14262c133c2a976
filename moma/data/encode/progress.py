"""Progress of the encoding of all sources, on any number of machines."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from moma.data.encode.worker import Encoded
from moma.data.shards import PartRecord
from moma.progress import show_progress

# Of a display; what is shown is computed only then.
SECONDS_BETWEEN_UPDATES = 1.0
_RATES = ("documents", "tokens", "images")

Display = Callable[["JobProgress"], None]


@contextmanager
def show_job(total: int | None, quiet: bool = False) -> Iterator[Display]:
    """Show the progress of a job on standard error: a live table, or lines if it is no terminal.

    Args:
        total: number of documents; None if it is unknown.
    """
    if quiet or not sys.stderr.isatty():
        with show_progress("encode", total, quiet) as report:
            yield lambda progress: report(progress.documents, progress.describe())
        return
    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        yield lambda progress: live.update(progress.table(total), refresh=True)


class JobProgress:
    """Documents, parts, speed by node and the remaining time of a job."""

    def __init__(self, display: Display, parts: int, size: int, complete: PartRecord, pending: int):
        """Begin to measure.

        Args:
            display: called with this object, at most once a second and at the end.
            parts: number of all parts.
            size: bytes of the parts that are not complete.
            complete: what earlier processes completed.
            pending: number of parts that are not complete.
        """
        self._display, self._parts, self._size = display, parts, size
        self._complete, self._complete_parts, self._read = complete, parts - pending, 0
        self._running: dict[tuple[str, int], PartRecord] = {}
        self._by_node: dict[str, Counter[str]] = {}
        self._begin = self._shown = time.monotonic()

    @property
    def documents(self) -> int:
        """Number of documents that were read, rejected ones included."""
        return self._done.documents_read

    def note(self, encoded: Encoded) -> None:
        """Note what has been encoded of a part."""
        key, so_far = encoded.task[:2], encoded.so_far
        before = self._running.get(key)
        if before is not None and before.stop <= so_far.stop:
            own = self._by_node.setdefault(encoded.node, Counter())
            own.update(so_far.total.model_dump())
            own.subtract(before.total.model_dump())
        self._running[key] = so_far
        if encoded.records is not None:
            del self._running[key]
            self._complete += so_far
            self._complete_parts += 1
            self._read += encoded.task.part.size
        now = time.monotonic()
        if now >= self._shown + SECONDS_BETWEEN_UPDATES or self._complete_parts == self._parts:
            self._shown = now
            self._display(self)

    def describe(self) -> str:
        """Return the progress as one line, without the number of documents."""
        total = sum(self._by_node.values(), Counter[str]())
        rates = [f"{rate} {key}/s" for key, rate in zip(_RATES, self._rates(total), strict=True)]
        if self._parts > 1:
            rates.insert(0, f"{self._complete_parts} of {self._parts} parts")
        if self._read:
            rates.append(f"{self._seconds_left:,.0f} s left")
        if rejected := self._done.rejected:
            rates.append(f"{rejected} rejected")
        if len(self._by_node) > 1:
            rates += [
                f"{node} {self._rates(counts)[0]} documents/s"
                for node, counts in sorted(self._by_node.items())
            ]
        return ", ".join(rates)

    def table(self, total: int | None) -> Group:
        """Return the progress as a line, and a table with a row for each node and one of all.

        Args:
            total: number of documents of the job; None if it is unknown.
        """
        done = self._done
        documents = f"{done.documents_read:,}" + (f" of {total:,}" if total else "")
        left = f", {self._seconds_left:,.0f} s left" if self._read else ""
        rejected = f", {done.rejected:,} rejected" if done.rejected else ""
        parts = f"{self._complete_parts:,} of {self._parts:,} parts"
        line = f"encode: {documents} documents, {parts}{rejected}{left}"
        table = Table()
        table.add_column("node")
        for key in _RATES:
            table.add_column(f"{key}/s", justify="right")
        for node, counts in sorted(self._by_node.items()):
            table.add_row(node or "this machine", *self._rates(counts))
        if len(self._by_node) > 1:
            table.add_section()
            table.add_row("all", *self._rates(sum(self._by_node.values(), Counter[str]())))
        return Group(Text(line), table)

    @property
    def _done(self) -> PartRecord:
        return sum(self._running.values(), self._complete)

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._begin, 1e-9)

    @property
    def _seconds_left(self) -> float:
        return self._seconds * (self._size - self._read) / self._read

    def _rates(self, counts: Counter[str]) -> list[str]:
        return [f"{counts[key] / self._seconds:,.0f}" for key in _RATES]
