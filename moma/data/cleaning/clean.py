"""Cleaning of the documents of one source, row by row."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np

from moma.data.cleaning.config import COMPARED_KEYS, CleaningConfig
from moma.data.cleaning.filters import drop, make_filter
from moma.data.documents import Document, DroppedImageError, ImageRef, Rejected

# A duplicate that is dropped: number of the document in its source, of the image in it or −1, index
# in COMPARED_KEYS, and index of the source and number of the document that it duplicates.
DROPPED = np.dtype(
    [("document", "<i8"), ("image", "<i4"), ("key", "u1"), ("source", "<i4"), ("original", "<i8")]
)


@dataclass(frozen=True)
class Cleaning:
    """How the documents of one source are cleaned; can be sent to another process.

    Attributes:
        config: the source's.
        fingerprint: changes with what is dropped or changed; empty if nothing is.
        duplicates: file of the duplicates that are dropped, if there are any.
        names: of the sources that were compared.
        starts: number of the source's documents before each part.
    """

    config: CleaningConfig
    fingerprint: str = ""
    duplicates: Path | None = None
    names: tuple[str, ...] = ()
    starts: tuple[int, ...] = (0,)

    def rows(
        self, rows: Iterable[Document | Rejected], part: int = 0
    ) -> Iterator[Document | Rejected]:
        """Yield a row for each row of a part: a dropped document becomes `Rejected`.

        A dropped image raises `DroppedImageError` when it is read.
        """
        if not self.fingerprint:
            yield from rows
            return
        apply = make_filter(self.config)
        duplicates = self._duplicates(part)
        for number, row in enumerate(rows):
            cleaned = apply(row) if isinstance(row, Document) else row
            found = duplicates.get(number)
            if found and isinstance(cleaned, Document):
                cleaned = self._drop(cleaned, found)
            yield cleaned

    def _duplicates(self, part: int) -> dict[int, list[tuple[int, str, str]]]:
        """Image or −1, key and reason of what is dropped of each document of a part."""
        if self.duplicates is None:
            return {}
        stored = np.load(self.duplicates, mmap_mode="r")
        limits = [*self.starts, np.iinfo(np.int64).max][part : part + 2]
        begin, end = np.searchsorted(stored["document"], limits)
        found: dict[int, list[tuple[int, str, str]]] = {}
        for document, image, key, source, original in stored[begin:end].tolist():
            reason = f"as document {original + 1} of {self.names[source]} has"
            found.setdefault(document - limits[0], []).append((image, COMPARED_KEYS[key], reason))
        return found

    def _drop(self, document: Document, found: list[tuple[int, str, str]]) -> Document | Rejected:
        images: dict[int, tuple[str, str]] = {}
        for image, key, reason in found:
            if image < 0:
                return drop(document, key, f"the same content {reason}")
            images[image] = key, f"the same image {reason}"
        positions = [at for at, part in enumerate(document.segments) if isinstance(part, ImageRef)]
        segments = [*document.segments]
        for image, (key, reason) in images.items():
            reference = segments[positions[image]]
            assert isinstance(reference, ImageRef)
            read = partial(_raise_dropped, reference.name, reason, key)
            segments[positions[image]] = replace(reference, read=read)
        return replace(document, segments=tuple(segments))


def _raise_dropped(image: str, reason: str, key: str) -> NoReturn:
    raise DroppedImageError(image, reason, key)
