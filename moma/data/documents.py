"""What every source yields: documents, each an ordered list of text and images.

A source is a configuration (a `Config` with a `kind`) whose `documents()` yields `Document`s in a
fixed order. Images are read when they are needed, so that a source of millions of rows costs no
memory.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from PIL import Image
from pydantic import Field

from moma.errors import UserError
from moma.hashes import unit_hashes
from moma.recipe import Config


@dataclass(frozen=True)
class ImageRef:
    """An image that is read on demand.

    Attributes:
        name: where it comes from, for messages: a path and row, or a description.
        read: returns the decoded image; raises `UserError` if it cannot be read.
        file: what it reads, where the image has a file of its own.
    """

    name: str
    read: Callable[[], Image.Image]
    file: Path | None = None

    def missing(self) -> str | None:
        """Why it cannot be read, if it has a file of its own that is not there; else None."""
        if self.file is None or os.path.exists(self.file):
            return None
        try:
            self.read()
        except UserError as error:
            return str(error)
        return None


Segment = str | ImageRef


@dataclass(frozen=True)
class Document:
    """Interleaved text and images, in reading order.

    Attributes:
        name: stable identity of the document inside its source.
        segments: text (`str`) and images, in order.
        held_out: whether the source itself keeps it from training; None leaves that to a hash
            of the name.
        row: where it stands in the source, for messages: `captions.jsonl, row 12`.
        held_out_with: documents that share it are held out together or not at all; left empty,
            the name.
    """

    name: str
    segments: tuple[Segment, ...]
    held_out: bool | None = None
    row: str = ""
    held_out_with: str = ""


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be a document.

    Attributes:
        row: where it stands in the source: `captions.jsonl, row 12`.
        reason: what is wrong and what to do.
    """

    row: str
    reason: str

    @property
    def told(self) -> str:
        """Row and reason, for a message."""
        return self.reason if self.row in self.reason else f"{self.row}: {self.reason}"


# A source's name is also the name of its shards' folder.
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class SourceConfig(Config):
    """What every source's section of a recipe may say; the base class of every kind of source.

    Attributes:
        kind: which kind it is; a subclass gives it a `Literal` and a default.
        name: of its shards, and in messages.
        weight: how often its documents are drawn, relative to the other sources.
        max_images: most images of a document; one with more goes on as further documents, so
            that nothing is lost. Left out, any number.
        held_out: share of the documents kept from training; left out, the recipe's.
    """

    kind: str = ""
    name: SourceName = ""
    weight: float = Field(default=1.0, gt=0)
    max_images: int | None = Field(default=None, ge=1)
    held_out: float | None = Field(default=None, ge=0, lt=1)

    def documents(self) -> "Iterator[Document | Rejected]":
        """See `Source.documents`."""
        raise NotImplementedError


class Source(Protocol):
    """Anything that yields documents in a fixed order."""

    @property
    def name(self) -> str:
        """Name of the source: of its shards, and in messages."""
        ...

    def documents(self) -> Iterator[Document | Rejected]:
        """Yield every row, in a fixed order: as a document, or as rejected with the reason.

        Raises:
            UserError: the source as a whole cannot be read.
        """
        ...


def held_out_share(source: Source | SourceConfig, default: float) -> float:
    """The share of a source's documents that is kept from training.

    Args:
        source: one that says so itself, or does not.
        default: the recipe's share, for a source that does not.
    """
    own = source.held_out if isinstance(source, SourceConfig) else None
    return default if own is None else own


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is kept from training: as its source says, else by a hash of its name.

    Args:
        document: the document.
        share: `held_out_share` of its source.
    """
    return bool(which_held_out([document], share)[0])


def which_held_out(documents: Sequence[Document], share: float) -> np.ndarray:
    """`is_held_out` of each document, bool of shape [documents]; in less time than one by one."""
    chosen = (
        unit_hashes([f"held out: {one.held_out_with or one.name}" for one in documents]) < share
    )
    for number, document in enumerate(documents):
        if document.held_out is not None:
            chosen[number] = document.held_out
    return chosen
