"""Interleaved text and images: JSON Lines of documents in reading order.

Two layouts are supported, in files and in data sets: a list of `segments`, and OBELICS' two
aligned lists (Laurençon et al. 2023, https://arxiv.org/abs/2306.16527), `texts` and `images`.
"""

import base64
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

from moma.data.documents import Document, ImageRef, Segment, SourceName, SourcePart
from moma.data.sources.jsonl import Line, parse_json_object, read_jsonl
from moma.data.sources.parts import IMAGE_BYTES, cut_files, line_cuts, ranges_of
from moma.data.sources.paths import (
    FileRange,
    expand_pattern,
    fingerprint_of,
    read_errors,
    resolve_inside,
)
from moma.data.sources.reading import (
    MAX_ROW_BYTES,
    ImageReaderConfig,
    Row,
    check_text,
    content_hash,
)
from moma.data.sources.row_files import named_images
from moma.errors import StorageError, UserError, list_names, quote, shorten
from moma.files import open_regular
from moma.recipe import RequiredPath

# A part of a document: a text, or the value that stands for an image in its row.
Part = tuple[Literal["text", "image"], Any]


class InterleavedConfig(ImageReaderConfig):
    """JSON Lines of interleaved documents.

    A row has `segments`, such as `[{"type": "text", "text": "…"}, {"type": "image", "image":
    "1.jpg"}]`, or two lists of equal length, `texts` and `images`, one of which is null at each
    position. An image is a path relative to the file's folder and inside it, or a `data:` URL with
    base64. A document is named by a hash of its row's texts and images.

    Attributes:
        path: the file, or a pattern such as `pages/*.jsonl`.
    """

    kind: Literal["interleaved"] = "interleaved"
    name: SourceName = "interleaved"
    path: RequiredPath

    def parts(self, part_bytes: int) -> list[SourcePart]:
        """Cut the files between rows."""
        cuts_of = partial(line_cuts, part_bytes=part_bytes, row_bytes=IMAGE_BYTES)
        return cut_files(expand_pattern(self.path), part_bytes, cuts_of)

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield the rows of the files."""
        lines = read_jsonl(ranges_of(expand_pattern(self.path), part))
        return ((line.location, partial(self._document, line)) for line in lines)

    def fingerprint(self) -> str:
        """Return what changes with the size or the time of a file, or of an image named in it."""
        files = expand_pattern(self.path)
        return fingerprint_of(files, named_images(read_jsonl(map(FileRange, files)), _image_files))

    def _document(self, line: Line) -> Document:
        return make_document(parse_parts(line.values()), partial(self._image_of, line))

    def _image_of(self, line: Line, number: int, value: Any) -> ImageRef:
        name = f"{line.location}, image {number}"
        if not isinstance(value, str):
            raise UserError(f"image {number} is not a text; write a path or a data: URL")
        if not _is_data_url(value):
            return self.image_ref(resolve_inside(Path(line.path).parent, value), name)
        read = partial(_bytes_in_row, Path(line.path), line.offset, number, name)
        return self.stored_image(read, name)


def parse_parts(values: dict[str, Any]) -> list[Part]:
    """Return the parts of a row, from `segments` or from `texts` and `images`.

    Raises:
        UserError: the row has neither, or they are malformed.
    """
    if values.get("segments") is not None:
        return parse_segments(values, "segments")
    if "texts" in values or "images" in values:
        return align_lists(values, "texts", "images")
    found = list_names(values)
    raise UserError(f"needs 'segments', or 'texts' and 'images'; the keys are: {found}")


def parse_segments(values: dict[str, Any], key: str) -> list[Part]:
    """Return the parts of a row from the segments under a key; raises `UserError` as above."""
    return _without_blanks([_parse_segment(segment) for segment in _require_list(values, key)])


def align_lists(values: dict[str, Any], texts_key: str, images_key: str) -> list[Part]:
    """Return the parts of a row from two lists; raises `UserError` as above."""
    texts, images = _require_list(values, texts_key), _require_list(values, images_key)
    if len(texts) != len(images):
        raise UserError(
            f"{quote(texts_key)} has {len(texts)} entries and {quote(images_key)} {len(images)}; "
            "both need one length"
        )
    parts: list[Part] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True), start=1):
        if text is not None and image is not None:
            raise UserError(f"entry {number} has a text and an image; one must be null")
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"entry {number} of {quote(texts_key)} is not a text; fix or remove the row"
            )
        parts.append(("image", image) if text is None else ("text", text))
    return _without_blanks([part for part in parts if part[1] is not None])


def _without_blanks(parts: list[Part]) -> list[Part]:
    kept = [(kind, value) for kind, value in parts if kind == "image" or value.strip()]
    if not kept:
        raise UserError("contains neither text nor an image; remove the row")
    return kept


def make_document(parts: list[Part], make_image: Callable[[int, Any], ImageRef]) -> Document:
    """Return the document of a row's parts, named by its content.

    `make_image` is called with an image's number in the document, from 1, and its value.

    Raises:
        UserError: a text is not valid, or `make_image` raises it.
    """
    segments: list[Segment] = []
    images = 0
    for kind, value in parts:
        if kind == "image":
            images += 1
            segments.append(make_image(images, value))
        else:
            segments.append(check_text(value, "of a segment"))
    return Document(content_name(parts), tuple(segments))


def content_name(parts: list[Part]) -> str:
    """Return a name that depends on the document's content only."""
    flat = [item for part in parts for item in part]
    return content_hash(*(item if isinstance(item, str | bytes) else str(item) for item in flat))


def _parse_segment(segment: Any) -> Part:
    kind = segment.get("type") if isinstance(segment, dict) else None
    if kind == "text" and isinstance(segment.get("text"), str):
        return ("text", segment["text"])
    if kind == "image" and segment.get("image") is not None:
        return ("image", segment["image"])
    raise UserError(
        'a segment is {"type": "text", "text": "…"} or {"type": "image", "image": "1.jpg"}; '
        "fix or remove the row"
    )


def _require_list(values: dict[str, Any], key: str) -> list[Any]:
    value = values.get(key)
    if not isinstance(value, list):
        raise UserError(f"{quote(key)} must be a list; fix or remove the row")
    return value


def _is_data_url(value: str) -> bool:
    return value[:5].lower() == "data:"


def _bytes_in_row(path: Path, offset: int, number: int, name: str) -> bytes:
    """An image that is in its row, which is read again instead of kept in memory."""
    try:
        images = _images_in_row(path, offset, fingerprint_of([path]))
        header, _, data = images[number - 1].partition(",")
        if not header.endswith(";base64"):
            raise UserError("its data: URL is not base64")
        return base64.b64decode(unquote_to_bytes("".join(data.split())), validate=True)
    except StorageError:
        raise
    # The file may have changed, so that the row has other values or is none.
    except (UserError, IndexError, AttributeError, ValueError) as error:
        reason = shorten(str(error))
        raise UserError(f"{name}: cannot read it ({reason}); fix or remove the row") from error


# One row, since consecutive images come from one row, which may be long.
@lru_cache(maxsize=1)
def _images_in_row(path: Path, offset: int, fingerprint: str) -> list[Any]:
    with read_errors(path), open_regular(path) as file:
        file.seek(offset)
        values = parse_json_object(file.readline(MAX_ROW_BYTES))
    return [value for kind, value in parse_parts(values) if kind == "image"]


def _image_files(line: Line) -> Iterator[Path]:
    for kind, value in parse_parts(line.values()):
        if kind == "image" and isinstance(value, str) and not _is_data_url(value):
            yield Path(line.path).parent / value
