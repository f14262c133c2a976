"""What the readers of files share: base classes, rejected rows, and splitting long documents."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image
from pydantic import Field

from moma.data.documents import (
    Document,
    ImageRef,
    Rejected,
    Segment,
    SourceConfig,
    SourceName,
    SourcePart,
    unit_hash,
)
from moma.errors import StorageError, UserError
from moma.images import MAX_PIXELS, PILLOW_MAX_PIXELS, read_image

# A row of a file, a page or a member of an archive is held in memory whole.
MAX_ROW_BYTES = 64 * 2**20


# The location of a row, for messages, and what makes its document or raises `UserError`.
Row = tuple[str, Callable[[], Document]]


class ReaderConfig(SourceConfig):
    """Base class of sources that read files; a subclass implements `read_rows`.

    One that can be cut into parts implements `parts`, too.

    Attributes:
        name: name of the source's shards and of the source in messages.
    """

    name: SourceName

    def documents(self) -> Iterator[Document | Rejected]:
        """Yield the document of every row, split if it has more than `max_images` images."""
        return self.read_part(SourcePart())

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield the rows of a part, by default of the whole source, in a fixed order.

        Raises:
            UserError: the source cannot be read.
        """
        raise NotImplementedError

    def read_part(self, part: SourcePart) -> Iterator[Document | Rejected]:
        """Yield the documents of a part."""
        for location, make in self.read_rows(part):
            try:
                document = replace(make(), row=location)
            except StorageError:
                raise
            except UserError as error:
                yield Rejected(location, str(error))
                continue
            if self.max_images is None:
                yield document
            else:
                yield from split_document(document, self.max_images)


class ImageReaderConfig(ReaderConfig):
    """Base class of sources that read image files.

    Attributes:
        max_pixels: maximum pixels of an image; a document with a larger one is rejected.
    """

    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=PILLOW_MAX_PIXELS)

    def image_ref(self, path: Path, location: str, remedy: str = "remove the row") -> ImageRef:
        """Return a reference to an image file; `location` and `remedy` as in `read_image`."""
        read = partial(read_image, path, location, remedy, self.max_pixels)
        return ImageRef(name=f"{location} ({path})", read=read, file=path)

    def stored_image(self, read: Callable[[], bytes], location: str) -> ImageRef:
        """Return a reference to an image without a file of its own; `read` returns its bytes."""
        return ImageRef(location, partial(_read_stored, read, location, self.max_pixels))


class CaptionedConfig(SourceConfig):
    """Base class of sources of images with captions.

    Attributes:
        caption_first: fraction of the documents whose caption comes before the image: 1 for all,
            0 for none; in between, a hash of the document's name and its caption decides.
    """

    caption_first: float = Field(default=0.75, ge=0, le=1)

    def with_caption(self, name: str, caption: str, image: ImageRef) -> tuple[Segment, Segment]:
        """Return a caption and its image in the order that `caption_first` gives to a document."""
        # Salted: the bare name already decides what is held out.
        caption_leads = unit_hash(f"caption first: {name} {caption}") < self.caption_first
        return (caption, image) if caption_leads else (image, caption)


class CaptionReaderConfig(CaptionedConfig, ImageReaderConfig):
    """Base class of sources that read image files with captions."""


def _read_stored(read: Callable[[], bytes], location: str, max_pixels: int) -> Image.Image:
    return read_image(read(), location, max_pixels=max_pixels)


def split_document(document: Document, max_images: int) -> Iterator[Document]:
    """Split a document before each image that exceeds `max_images`.

    The pieces are named `name`, `name#2`, … and are held out together.
    """
    pieces: list[list[Segment]] = [[]]
    images = 0
    for segment in document.segments:
        if isinstance(segment, ImageRef):
            if images and images % max_images == 0:
                pieces.append([])
            images += 1
        pieces[-1].append(segment)
    for number, piece in enumerate(pieces, start=1):
        yield replace(
            document,
            name=document.name if number == 1 else f"{document.name}#{number}",
            segments=tuple(piece),
            held_out_with=document.held_out_with or document.name,
        )


def check_text(text: str, where: str) -> str:
    """Return the text if it can be encoded as UTF-8.

    Raises:
        UserError: it contains half of a surrogate pair, from JSON or for a byte that is not UTF-8.
    """
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(
            f"the text {where} is not valid Unicode: it contains half of a surrogate pair or "
            "bytes that are not UTF-8; fix or remove the row, or convert the file to UTF-8"
        )
    return text


def content_hash(*parts: str | bytes) -> str:
    """Return a document name that depends on its content only."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8) + data)
    return hashed.hexdigest()[:16]
