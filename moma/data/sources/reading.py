"""What the readers of files share: rows of bounded size, safe paths, and cutting long documents.

A row that cannot be used raises `UserError` with the bare reason where it is found; `attempt`
turns that into a `Rejected` row, so that one bad row does not stop the others.
"""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from moma.data.documents import (
    Document,
    ImageRef,
    Rejected,
    Segment,
    SourceConfig,
    SourceName,
)
from moma.errors import UserError, json_error_message
from moma.hashes import unit_hash
from moma.images import MAX_PIXELS, MOST_PIXELS, read_image

# A row of a list, a page or a member of an archive is held in memory whole.
MAX_ROW_BYTES = 64 * 2**20


class ReaderConfig(SourceConfig):
    """What every reader of files may be told.

    Attributes:
        name: name of the source: of its shards, and in messages.
    """

    name: SourceName

    def documents(self) -> Iterator[Document | Rejected]:
        """Yield every row, in a fixed order; a document with too many images as several.

        Raises:
            UserError: the source as a whole cannot be read.
        """
        for row in self._rows():
            if isinstance(row, Rejected) or self.max_images is None:
                yield row
            else:
                yield from cut(row, self.max_images)

    def _rows(self) -> Iterator[Document | Rejected]:
        """Every row, uncut."""
        raise NotImplementedError


class ImageReaderConfig(ReaderConfig):
    """What every reader of images may be told.

    Attributes:
        max_pixels: most pixels of an image; a document with a larger one is rejected.
    """

    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MOST_PIXELS)

    def _image(self, path: Path, place: str, instead: str = "remove the row") -> ImageRef:
        read = partial(read_image, path, place, instead, self.max_pixels)
        return ImageRef(name=f"{place} ({path})", read=read, file=path)


class CaptionReaderConfig(ImageReaderConfig):
    """What every reader of images with captions may be told.

    Attributes:
        caption_first: share of the documents whose caption stands before the image: 1 for all,
            0 for none; between them a hash of the document decides.
    """

    caption_first: float = Field(default=0.75, ge=0, le=1)

    def _ordered(self, name: str, caption: str, image: ImageRef) -> tuple[Segment, Segment]:
        # Salted: the bare name already decides what is held out.
        caption_leads = unit_hash(f"caption first: {name} {caption}") < self.caption_first
        return (caption, image) if caption_leads else (image, caption)


def cut(document: Document, max_images: int) -> Iterator[Document]:
    """Cut a document before each image that would be one too many.

    The pieces are named `name`, `name#2`, … and are held out together.
    """
    pieces: list[list[Segment]] = [[]]
    images = 0
    for segment in document.segments:
        if isinstance(segment, ImageRef):
            if images == max_images:
                pieces.append([])
                images = 0
            images += 1
        pieces[-1].append(segment)
    for number, piece in enumerate(pieces, start=1):
        yield replace(
            document,
            name=document.name if number == 1 else f"{document.name}#{number}",
            segments=tuple(piece),
            held_out_with=document.held_out_with or document.name,
        )


def attempt(place: str, make: Callable[[], Document]) -> Document | Rejected:
    """The document, or the row as rejected with the reason."""
    try:
        return make()
    except UserError as error:
        return Rejected(place, str(error))


@dataclass(frozen=True)
class Line:
    """A line of a file.

    Attributes:
        path: the file.
        number: of the line, from 1.
        offset: where it begins, in bytes.
        data: the line with its end; None if it is longer than `MAX_ROW_BYTES`.
    """

    path: Path
    number: int
    offset: int
    data: bytes | None

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.path}, row {self.number}"

    def bounded(self) -> bytes:
        """The line.

        Raises:
            UserError: it is too long.
        """
        if self.data is None:
            raise UserError(f"longer than {MAX_ROW_BYTES >> 20} MiB; break it up or remove the row")
        return self.data

    def text(self) -> str:
        """The line as text.

        Raises:
            UserError: it is too long or not UTF-8.
        """
        try:
            return self.bounded().decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 ({error}); convert the file") from error

    def values(self) -> dict[str, Any]:
        """The JSON object of the line.

        Raises:
            UserError: it is none.
        """
        return parse_object(self.bounded())


def lines(path: Path) -> Iterator[Line]:
    """The lines of a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            number, offset = 0, 0
            while data := file.readline(MAX_ROW_BYTES + 1):
                number += 1
                whole = len(data) <= MAX_ROW_BYTES
                yield Line(path, number, offset, data if whole else None)
                while data and not data.endswith(b"\n"):
                    data = file.readline(MAX_ROW_BYTES)
                offset = file.tell()
    except OSError as error:
        raise _unreadable(path, error) from error


def filled(rows: Iterable[Line]) -> Iterator[Line]:
    """The lines that are not blank."""
    return (row for row in rows if row.data is None or row.data.strip())


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the data are none.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"not valid JSON ({json_error_message(error)}); mend or remove the row"
        ) from error
    if not isinstance(values, dict):
        raise UserError('no JSON object; write one such as {"image": "1.png", "caption": "…"}')
    return values


def text_of(values: dict[str, Any], key: str) -> str:
    """The text under a key, which must be there and not blank.

    Raises:
        UserError: it is not; the reason names the keys that are.
    """
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"needs a text under '{key}', not {type(value).__name__}")
    if not value or not value.strip():
        found = ", ".join(values) or "none"
        raise UserError(f"needs a text under '{key}'; the keys there are: {found}")
    return checked_text(value, f"under '{key}'")


def checked_text(value: str, where: str) -> str:
    """The text itself.

    Raises:
        UserError: it holds what no text may hold, though JSON can spell it.
    """
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(
            f"the text {where} is not valid: it holds half of a surrogate pair; "
            "mend or remove the row"
        )
    return value


def digest(*parts: str | bytes) -> str:
    """A name that depends on the content alone."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        hashed.update(len(data).to_bytes(8) + data)
    return hashed.hexdigest()[:16]


def inside(folder: Path, name: str) -> Path:
    """A path below a folder; links are followed, so that they cannot lead out either.

    Raises:
        UserError: the name leads out of the folder, or is none.
    """
    if re.match(r"[a-z]+://", name, re.IGNORECASE):
        raise UserError(f"the image '{name}' is a web address; fetch it and write its path")
    root = folder.resolve()
    try:
        path = (root / name).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a zero byte, a circle of links
        raise UserError(f"the image {name!r} is no path ({error})") from error
    if not path.is_relative_to(root):
        raise UserError(
            f"the image '{name}' lies outside {folder}; "
            "copy it into the folder and write its path relative to it"
        )
    return path


def matching(pattern: Path) -> list[Path]:
    """The files that a path with `*`, `?`, `[…]` or `**` stands for, sorted.

    Raises:
        UserError: there are none.
    """
    if not glob.has_magic(str(pattern)) or pattern.exists():
        return [pattern]
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    files = [path for path in found if path.is_file()]
    if not files:
        raise UserError(f"{pattern}: no file is called so; check the source's 'path'")
    return files


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; hidden ones are left out.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: cannot read it (no such folder); check the source's 'path'")
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def fingerprint_of(files: Iterable[Path], optional: Iterable[Path] = ()) -> str:
    """Changes when the size or the time of a file does, or when files come or go.

    Args:
        files: files that must be there.
        optional: files that may be missing.

    Raises:
        UserError: one of `files` is missing.
    """
    hashed = hashlib.sha256()
    for path, needed in (*((p, True) for p in files), *((p, False) for p in optional)):
        try:
            status = path.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError) as error:
            if needed:
                raise _unreadable(path, error) from error
            state = "missing"
        hashed.update(f"{path} {state}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:16]


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"{path}: cannot read it ({reason}); check the source's 'path'")
