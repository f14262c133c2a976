"""Text and images in reading order: JSON Lines of interleaved documents.

Two layouts are read, in files as in data sets: a list of `segments`, and OBELICS' two aligned
lists (Laurençon et al. 2023, https://arxiv.org/abs/2306.16527), `texts` and `images`.
"""

import base64
import binascii
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from moma.data.documents import Document, ImageRef, Rejected, Segment, SourceName
from moma.data.sources.reading import (
    ImageReaderConfig,
    Line,
    attempt,
    checked_text,
    digest,
    filled,
    fingerprint_of,
    inside,
    lines,
    matching,
)
from moma.errors import UserError
from moma.images import read_image
from moma.recipe import RequiredPath

# A part of a document: text, or what a row says of an image.
Part = tuple[Literal["text", "image"], Any]


class InterleavedConfig(ImageReaderConfig):
    """JSON Lines of interleaved documents.

    A row has `segments`, such as `[{"type": "text", "text": "…"}, {"type": "image", "image":
    "1.jpg"}]`, or two lists of one length, `texts` and `images`, where one of the two is null at
    each place. An image is a path relative to the file's folder, which it does not leave, or a
    `data:` address with base64. A document is named by a digest of its row's texts and images.

    Attributes:
        path: the file, or a pattern such as `pages/*.jsonl`.
    """

    kind: Literal["interleaved"] = "interleaved"
    name: SourceName = "interleaved"
    path: RequiredPath

    def _rows(self) -> Iterator[Document | Rejected]:
        for path in matching(self.path):
            for line in filled(lines(path)):
                yield attempt(line.place, partial(self._document, line))

    def fingerprint(self) -> str:
        """Changes when the size or the time of a file does, or of an image named in it."""
        files = matching(self.path)
        return fingerprint_of(files, (image for file in files for image in _named_images(file)))

    def _document(self, line: Line) -> Document:
        parts = parts_of(line.values())
        segments = segments_of(parts, partial(self._image_of, line))
        return Document(name=name_of(parts), segments=segments, row=line.place)

    def _image_of(self, line: Line, number: int, value: Any) -> ImageRef:
        name = f"{line.place}, image {number}"
        if not isinstance(value, str):
            raise UserError(f"image {number} is no text; write a path or a data: address")
        if not value.startswith("data:"):
            return self._image(inside(line.path.parent, value), name)
        read = partial(_read_from_row, line.path, line.offset, number, name, self.max_pixels)
        return ImageRef(name, read)


def parts_of(values: dict[str, Any]) -> list[Part]:
    """The parts of a row, from `segments` or from `texts` and `images`.

    Raises:
        UserError: the row holds neither, or not as it should.
    """
    if values.get("segments") is not None:
        parts = [_segment(segment) for segment in _list(values, "segments")]
    elif "texts" in values or "images" in values:
        parts = _aligned(_list(values, "texts"), _list(values, "images"))
    else:
        found = ", ".join(values) or "none"
        raise UserError(f"needs 'segments', or 'texts' and 'images'; the keys there are: {found}")
    kept = [(kind, value) for kind, value in parts if kind == "image" or value.strip()]
    if not kept:
        raise UserError("holds no text and no image; remove the row")
    return kept


def segments_of(parts: list[Part], image_of: Callable[[int, Any], ImageRef]) -> tuple[Segment, ...]:
    """A document's segments.

    Args:
        parts: of the row.
        image_of: an image's number in the document, from 1, and its value → the image.

    Raises:
        UserError: a text is not valid, or `image_of` raises it.
    """
    segments: list[Segment] = []
    images = 0
    for kind, value in parts:
        if kind == "image":
            images += 1
            segments.append(image_of(images, value))
        else:
            segments.append(checked_text(value, "of a segment"))
    return tuple(segments)


def name_of(parts: list[Part]) -> str:
    """A name that depends on the document's content alone."""
    flat = [piece for kind, value in parts for piece in (kind, value)]
    return digest(*(piece if isinstance(piece, (str, bytes)) else str(piece) for piece in flat))


def _segment(segment: Any) -> Part:
    kind = segment.get("type") if isinstance(segment, dict) else None
    if kind == "text" and isinstance(segment.get("text"), str):
        return ("text", segment["text"])
    if kind == "image" and segment.get("image") is not None:
        return ("image", segment["image"])
    raise UserError(
        'a segment is {"type": "text", "text": "…"} or {"type": "image", "image": "1.jpg"}; '
        "mend or remove the row"
    )


def _aligned(texts: list[Any], images: list[Any]) -> list[Part]:
    if len(texts) != len(images):
        raise UserError(
            f"'texts' has {len(texts)} places and 'images' {len(images)}; they must be one length"
        )
    parts: list[Part] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True), start=1):
        if text is not None and image is not None:
            raise UserError(f"place {number} has a text and an image; one must be null")
        if text is not None and not isinstance(text, str):
            raise UserError(f"place {number} of 'texts' is no text")
        if text is not None:
            parts.append(("text", text))
        elif image is not None:
            parts.append(("image", image))
    return parts


def _list(values: dict[str, Any], key: str) -> list[Any]:
    value = values.get(key)
    if not isinstance(value, list):
        raise UserError(f"'{key}' must be a list; mend or remove the row")
    return value


def _read_from_row(path: Path, offset: int, number: int, name: str, max_pixels: int) -> Image.Image:
    """Read an image that stands in its row; the row is read again, so as not to be kept."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            values = Line(path, 0, offset, file.readline()).values()
        images = [value for kind, value in parts_of(values) if kind == "image"]
        header, _, data = images[number - 1].partition(",")
        if not header.endswith(";base64"):
            raise UserError("its data: address has no base64")
        encoded = base64.b64decode(data, validate=True)
    except (UserError, OSError, IndexError, AttributeError, binascii.Error) as error:
        raise UserError(f"{name}: cannot read it ({error}); mend or remove the row") from error
    return read_image(encoded, name, max_pixels=max_pixels)


def _named_images(file: Path) -> Iterator[Path]:
    for line in filled(lines(file)):
        try:
            parts = parts_of(line.values())
        except UserError:
            continue  # the file's own fingerprint tells when that changes
        for kind, value in parts:
            if kind == "image" and isinstance(value, str) and not value.startswith("data:"):
                yield file.parent / value
