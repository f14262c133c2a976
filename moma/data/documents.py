"""What every source yields: documents, each an ordered list of text and images.

A source is its configuration, a `SourceConfig`, with a method `documents()`. Images
are read when they are needed, so that a source of millions of documents takes no memory.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field

from moma.data.cleaning.config import CleaningConfig
from moma.errors import StorageError, UserError, shorten
from moma.recipe import Config

# Characters of a rejected row's location and reason; either may quote what it found.
_MAX_LOCATION, _MAX_REASON = 300, 1000


@dataclass(frozen=True)
class ImageRef:
    """An image that is read on demand.

    Attributes:
        name: where it comes from, for messages.
        read: returns the decoded image; raises `UserError` if it cannot be read.
        file: path of the image file, if the image has a file of its own.
    """

    name: str
    read: Callable[[], Image.Image]
    file: Path | None = None

    def missing(self) -> str | None:
        """Return why the image cannot be read if its own file does not exist, else None."""
        if self.file is None or os.path.exists(self.file):
            return None
        try:
            self.read()
        except StorageError:
            raise
        except UserError as error:
            return str(error)
        return None


class DroppedImageError(UserError):
    """An image that a key of `clean` drops, raised when it is read."""

    def __init__(self, image: str, reason: str, dropped_by: str) -> None:
        super().__init__(image, reason, dropped_by)
        self.rejected = Rejected(image, f"clean.{dropped_by}: {reason}", dropped_by)

    def __str__(self) -> str:
        return self.rejected.message


Segment = str | ImageRef


@dataclass(frozen=True)
class Document:
    """Interleaved text and images, in reading order.

    Attributes:
        name: stable name of the document within its source.
        segments: text (`str`) and images, in order.
        held_out: whether the source itself holds it out; None leaves that to a hash of the name.
        row: location in the source, for messages: `captions.jsonl, row 12`.
        held_out_with: documents with the same value are held out together or not at all; the name
            if empty.
    """

    name: str
    segments: tuple[Segment, ...]
    held_out: bool | None = None
    row: str = ""
    held_out_with: str = ""


@dataclass(frozen=True)
class Rejected:
    """A document that is not used: its location, and why, shortened.

    Attributes:
        row: location in the source.
        reason: what is wrong and what to do.
        dropped_by: key of `clean` that drops it; empty for a document that cannot be used.
    """

    row: str
    reason: str
    dropped_by: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "row", shorten(self.row, _MAX_LOCATION))
        object.__setattr__(self, "reason", shorten(self.reason, _MAX_REASON))

    @property
    def message(self) -> str:
        """Location and reason."""
        return self.reason if self.row in self.reason else f"{self.row}: {self.reason}"


class SourcePart(Config):
    """Consecutive documents of a source, which can be read independently of the others.

    Attributes:
        first, stop: range of the source's files, in its order, that it reads; `stop` is None where
            the part is the whole source.
        begin, end: where it begins in the first file, and ends in the last one, None for its end;
            bytes, row groups or rows, as the source counts.
        row: number of rows of the first file before `begin`.
        file: the first file's name.
        names: hash of the names of the files, which shows that they are still the same.
        size: bytes to read, approximately; 0 if unknown.
    """

    first: int = 0
    stop: int | None = None
    begin: int = 0
    end: int | None = None
    row: int = 0
    file: str = ""
    names: str = ""
    size: int = 0


def drops_document(single: bool, images: int, dropped: int) -> bool:
    """Return whether a document is dropped with its images.

    It is if none of them is left, beside one text or none: a caption without its image.
    """
    return single and dropped == images > 0


# A source's name is also the name of its shards' folder.
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class SourceConfig(Config):
    """Base class of every kind of source; a source is a section of a recipe.

    Attributes:
        kind: kind of the source; a subclass gives it a `Literal` type and a default.
        name: name of the source's shards and of the source in messages.
        weight: how often its documents are sampled, relative to the other sources.
        max_images: maximum images of a document; one with more is split into several documents,
            so that nothing is lost. Unlimited by default.
        held_out: fraction of the documents held out from training; the recipe's by default.
        clean: which documents and images are dropped.
    """

    kind: str = ""
    name: SourceName = ""
    weight: float = Field(default=1.0, gt=0)
    max_images: int | None = Field(default=None, ge=1)
    held_out: float | None = Field(default=None, ge=0, lt=1)
    clean: CleaningConfig = CleaningConfig()

    def documents(self) -> Iterator[Document | Rejected]:
        """Yield every document in a fixed order, those that cannot be used as `Rejected`.

        Raises:
            UserError: the source as a whole cannot be read.
        """
        raise NotImplementedError

    def parts(self, part_bytes: int) -> list[SourcePart]:
        """Cut the source into parts of about `part_bytes` bytes, in the order of the documents.

        A source that can only be read from its beginning is one part.
        """
        return [SourcePart()]

    def read_part(self, part: SourcePart) -> Iterator[Document | Rejected]:
        """Yield the documents of one of the `parts`."""
        return self.documents()

    def fingerprint(self) -> str:
        """Return a value that changes when the files that the source reads do."""
        return ""


def source_fingerprint(source: SourceConfig, held_out: float, cleaning: str = "") -> str:
    """Return a value that changes with a source, its files, and its `held_out_share`.

    `cleaning` is a fingerprint of what `clean` changes.
    """
    # The sampling weight does not change the documents.
    config = source.model_dump_json(exclude={"weight", "clean"})
    parts = (source.name, config, source.fingerprint(), str(held_out), *filter(None, [cleaning]))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def held_out_share(source: SourceConfig, default: float) -> float:
    """Return the fraction of a source's documents that is held out: its own, or the default."""
    return default if source.held_out is None else source.held_out


def is_held_out(document: Document, share: float) -> bool:
    """Return whether a document is held out: as its source decides, else by a hash of its name.

    `share` is the `held_out_share` of its source.
    """
    return bool(which_held_out([document], share)[0])


def which_held_out(documents: Sequence[Document], share: float) -> np.ndarray:
    """Return `is_held_out` of each document, bool of shape [documents]; faster than one by one."""
    names = [f"held out: {document.held_out_with or document.name}" for document in documents]
    held_out = unit_hashes(names) < share
    for index, document in enumerate(documents):
        if document.held_out is not None:
            held_out[index] = document.held_out
    return held_out


def unit_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on `text` only: splits by it are stable."""
    return float(unit_hashes([text])[0])


def unit_hashes(texts: Iterable[str]) -> np.ndarray:
    """Return the `unit_hash` of each text, float64 of shape [texts]; faster than one by one."""
    hashes = b"".join([hashlib.sha256(text.encode()).digest() for text in texts])
    # The first 7 of the 32 bytes of each hash.
    return (np.frombuffer(hashes, ">u8")[::4] >> 8) / 2**56
