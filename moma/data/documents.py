"""What every source yields: documents, each an ordered list of text and pictures.

A source is a configuration (a `Config` with a `kind`) whose `documents()` yields `Document`s in a
fixed order. Pictures are read when they are needed, so that a source of millions of rows costs no
memory.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Picture:
    """A picture that is read on demand.

    Attributes:
        name: where it comes from, for messages: a path and row, or a description.
        read: returns the decoded picture; raises `UserError` if it cannot be read.
    """

    name: str
    read: Callable[[], Image.Image]


Segment = str | Picture


@dataclass(frozen=True)
class Document:
    """Interleaved text and pictures, in reading order.

    Attributes:
        name: stable identity of the document inside its source.
        segments: text (`str`) and pictures, in order.
        held_out: whether the source itself keeps it from training; None leaves that to a hash
            of the name.
    """

    name: str
    segments: tuple[Segment, ...]
    held_out: bool | None = None


class Source(Protocol):
    """Anything that yields documents in a fixed order."""

    @property
    def name(self) -> str:
        """Name of the source: of its shards, and in messages."""
        ...

    def documents(self) -> Iterator[Document]:
        """Yield every document; raises `UserError` naming the row that cannot be read."""
        ...


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone: splits by it are stable under growth."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is kept from training: as its source says, else by a hash of its name."""
    if document.held_out is not None:
        return document.held_out
    return unit_hash(f"held out: {document.name}") < share
