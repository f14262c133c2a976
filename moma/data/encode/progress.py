"""Progress of the encoding of all sources, on any number of machines."""

import time
from collections import Counter

from moma.data.encode.worker import Encoded
from moma.data.shards import Part
from moma.progress import ProgressCallback


class JobProgress:
    """Reports documents, parts, speed by node and the remaining time of a job."""

    def __init__(
        self, report: ProgressCallback, parts: int, size: int, complete: Part, pending: int
    ) -> None:
        """Begin to measure.

        Args:
            report: called with the number of documents and a note.
            parts: number of all parts.
            size: bytes of the parts that are not complete.
            complete: what earlier processes completed.
            pending: number of parts that are not complete.
        """
        self._report, self._parts, self._size = report, parts, size
        self._complete, self._complete_parts, self._read = complete, parts - pending, 0
        self._running: dict[tuple[str, int], Part] = {}
        self._by_node: dict[str, Counter[str]] = {}
        self._begin = time.monotonic()

    def note(self, encoded: Encoded) -> None:
        """Note what has been encoded of a part, and report."""
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
        done = sum(self._running.values(), self._complete)
        self._report(done.documents_read, self._describe(done.rejected))

    def _describe(self, rejected: int) -> str:
        seconds = max(time.monotonic() - self._begin, 1e-9)
        total = sum(self._by_node.values(), Counter[str]())
        rates = [
            f"{total[key] / seconds:,.0f} {key}/s" for key in ("documents", "tokens", "images")
        ]
        if self._parts > 1:
            rates.insert(0, f"{self._complete_parts} of {self._parts} parts")
        if self._read:
            rates.append(f"{seconds * (self._size - self._read) / self._read:,.0f} s left")
        if rejected:
            rates.append(f"{rejected} rejected")
        if len(self._by_node) > 1:
            rates += [
                f"{node} {counts['documents'] / seconds:,.0f} documents/s"
                for node, counts in sorted(self._by_node.items())
            ]
        return ", ".join(rates)
