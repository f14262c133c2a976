"""Readers for the user's own data: captioned pictures and plain text.

Each is a section of a recipe and a `Source` at once. Rows are read one by one and pictures only
when they are needed, so that the size of the data does not matter.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image, ImageOps
from pydantic import Field

from moma.data.documents import Document, Picture, unit_hash
from moma.errors import UserError
from moma.recipe import Config

# A source's name is also the name of its shards' folder.
SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class CaptionsConfig(Config):
    """A folder of pictures with a caption each, listed in its `captions.jsonl`.

    A row of the list is an object such as `{"image": "cats/1.jpg", "caption": "Two cats."}`; the
    picture's path is relative to the folder and stays inside it.

    Attributes:
        name: name of the source: of its shards, and in messages.
        weight: how often its documents are drawn, relative to the other sources.
        path: the folder.
        caption_first: share of the documents whose caption stands before the picture.
    """

    kind: Literal["captions"] = "captions"
    name: SourceName = "captions"
    weight: float = Field(default=1.0, gt=0)
    path: Path
    caption_first: float = Field(default=0.75, ge=0, le=1)

    @property
    def _list(self) -> Path:
        return self.path / "captions.jsonl"

    def documents(self) -> Iterator[Document]:
        """Yield a document for each row, named after its picture.

        Several captions of one picture share a name, and so are held out together or not at all.

        Raises:
            UserError: a row cannot be used; the message names the file and the row, from 1. A
                picture that cannot be read raises it when it is read.
        """
        for number, line in _lines(self._list):
            if line.strip():
                yield self._document(line, f"{self._list}, row {number}")

    def stamp(self) -> str:
        """Changes when the list of captions does."""
        return _stamp(self._list)

    def _document(self, line: bytes, place: str) -> Document:
        row = _parse_row(line, place)
        image, caption = (_text_of(row, key, place) for key in ("image", "caption"))
        path = self._inside(image, place)
        picture = Picture(name=f"{place} ({path})", read=partial(read_picture, path, place))
        # Salted: the bare name already decides what is held out.
        caption_leads = unit_hash(f"caption first: {image} {caption}") < self.caption_first
        segments = (caption, picture) if caption_leads else (picture, caption)
        return Document(name=image, segments=segments)

    def _inside(self, image: str, place: str) -> Path:
        """The picture's path; links are followed, so that they cannot lead out either."""
        folder = self.path.resolve()
        path = (folder / image).resolve()
        if not path.is_relative_to(folder):
            raise UserError(
                f"{place}: the image '{image}' lies outside {self.path}; "
                "copy it into the folder and write its path relative to it"
            )
        return path


class TextConfig(Config):
    """A UTF-8 text file; its paragraphs, separated by blank lines, are the documents.

    Attributes:
        name: name of the source: of its shards, and in messages.
        weight: how often its documents are drawn, relative to the other sources.
        path: the file.
    """

    kind: Literal["text"] = "text"
    name: SourceName = "text"
    weight: float = Field(default=1.0, gt=0)
    path: Path

    def documents(self) -> Iterator[Document]:
        """Yield a document for each paragraph, named by a digest of its text.

        Raises:
            UserError: the file cannot be read or is not UTF-8; the message names the row, from 1.
        """
        rows = ((number, _decode(self.path, number, line)) for number, line in _lines(self.path))
        for filled, paragraph in groupby(rows, key=lambda row: bool(row[1].strip())):
            if filled:
                text = "".join(line for _, line in paragraph).strip()
                yield Document(hashlib.sha256(text.encode()).hexdigest()[:16], (text,))

    def stamp(self) -> str:
        """Changes when the file does."""
        return _stamp(self.path)


def read_picture(path: Path, place: str, instead: str = "remove the row") -> Image.Image:
    """Read a picture and turn it upright.

    Args:
        path: the file.
        place: where the file is named, for the message.
        instead: the other way out, for the message.

    Raises:
        UserError: the file is missing, damaged, or larger than Pillow's limit on pixels.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise UserError(f"{place}: there is no {path}; add the file or {instead}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{place}: {path} is too large ({error}); shrink it") from error
    # Damaged files make Pillow's decoders raise nearly anything, from SyntaxError to struct.error.
    except Exception as error:
        raise UserError(
            f"{place}: cannot read {path} ({error}); save it again as PNG or JPEG or {instead}"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Rows of a file with their numbers, from 1."""
    try:
        with path.open("rb") as file:
            yield from enumerate(file, start=1)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror}); check the source's 'path'"
        ) from error


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {number}: not UTF-8 ({error}); convert the file") from error


def _parse_row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not valid JSON ({error}); mend or remove the row") from error
    if not isinstance(row, dict):
        raise UserError(f'{place}: write an object such as {{"image": "1.png", "caption": "…"}}')
    return row


def _text_of(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        found = ", ".join(row) or "none"
        raise UserError(f"{place}: needs a text under '{key}'; the keys there are: {found}")
    # JSON can spell what no text and no path may hold: half of a surrogate pair, a zero byte.
    if "\0" in value or re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: the text under '{key}' is not valid; mend or remove the row")
    return value


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror}); check the source's 'path'"
        ) from error
    return f"{status.st_size} {status.st_mtime_ns}"
