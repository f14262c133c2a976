"""Reading files line by line, and JSON Lines: a JSON object on every line."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from moma.data.documents import Document, Rejected
from moma.data.sources.paths import fingerprint_of, unreadable
from moma.data.sources.reading import MAX_ROW_BYTES, attempt, check_text
from moma.errors import UserError, json_error_message, list_names, quote

# Files of gzip, xz, Zstandard and bzip2.
_COMPRESSED = re.compile(rb"\x1f\x8b\x08|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|BZh\d1AY&SY", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """A line of a file.

    Attributes:
        path: the file.
        number: line number, from 1.
        offset: byte offset of the line in the file.
        data: the line with its line break; None if it is longer than `MAX_ROW_BYTES`.
    """

    path: Path
    number: int
    offset: int
    data: bytes | None

    @property
    def location(self) -> str:
        """File and row, for messages."""
        return f"{self.path}, row {self.number}"

    @property
    def is_blank(self) -> bool:
        """Whether the line holds white space only."""
        if self.data is None:
            return False
        start = self.data.strip()[:1]
        is_ascii = b" " < start < b"\x7f"  # spares most lines the decoding
        return not is_ascii and not self.data.decode("utf-8-sig", "replace").strip()

    def content(self) -> bytes:
        """Return the line.

        Raises:
            UserError: it is too long.
        """
        if self.data is None:
            raise UserError(f"longer than {MAX_ROW_BYTES >> 20} MiB; split or remove it")
        return self.data

    def text(self) -> str:
        """Return the line as text.

        Raises:
            UserError: it is too long or not UTF-8.
        """
        try:
            return self.content().decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 ({error}); convert the file to UTF-8") from error

    def values(self) -> dict[str, Any]:
        """Return the line's JSON object.

        Raises:
            UserError: it is too long or not a JSON object.
        """
        return parse_json_object(self.content())


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file; of one that is too long, only where it is.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if _COMPRESSED.match(file.read(10)):
                raise UserError(f"{path}: cannot read it (it is compressed); decompress it first")
            file.seek(0)
            yield from iterate_lines(file, path)
    except OSError as error:
        raise unreadable(path, error) from error


def iterate_lines(file: BinaryIO, path: Path) -> Iterator[Line]:
    """Yield the lines of an open file; `path` is its name in messages."""
    number, offset = 0, 0
    while data := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        yield Line(path, number, offset, data if len(data) <= MAX_ROW_BYTES else None)
        offset += len(data)
        while data and not data.endswith(b"\n"):
            data = file.readline(MAX_ROW_BYTES)
            offset += len(data)


def read_jsonl(
    files: Iterable[Path], make_document: Callable[[Line], Document]
) -> Iterator[Document | Rejected]:
    """Yield a document, or the reason why there is none, for each line that is not blank.

    Args:
        files: JSON Lines files.
        make_document: makes a document of a line; raises `UserError` if it cannot.
    """
    for line in _rows(files):
        yield attempt(line.location, partial(make_document, line))


def jsonl_fingerprint(files: list[Path], image_files: Callable[[Line], Iterable[Path]]) -> str:
    """Return a fingerprint of JSON Lines files and of the images that their rows name.

    Args:
        files: JSON Lines files.
        image_files: the images that a line names; may raise `UserError`.
    """
    return fingerprint_of(files, _named_images(files, image_files))


def _named_images(
    files: Iterable[Path], image_files: Callable[[Line], Iterable[Path]]
) -> Iterator[Path]:
    for line in _rows(files):
        try:
            yield from image_files(line)
        except UserError:
            continue  # The file's own size and time cover rows that are rejected.


def _rows(files: Iterable[Path]) -> Iterator[Line]:
    return (line for path in files for line in read_lines(path) if not line.is_blank)


class _RepeatedKey:
    """The value of a key that an object has more than once, where `json` would keep the last."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        values |= {key: _RepeatedKey() for key in values if keys.count(key) > 1}
    return values


_JSON_TYPES = {dict: "an object", list: "a list", bool: "a boolean", float: "a number"}
# Integers become floats, since Python refuses those of more than 4,300 digits.
JSON_DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=_make_object)


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        UserError: the data are not a JSON object in UTF-8.
    """
    try:
        values = JSON_DECODER.decode(data.decode("utf-8-sig", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"not valid JSON ({json_error_message(error)}); fix or remove the row"
        ) from error
    if not isinstance(values, dict):
        raise UserError('not a JSON object; write one such as {"image": "1.png", "caption": "…"}')
    return values


def require_text(values: dict[str, Any], *keys: str) -> str:
    """Return the text under the first of several keys that is present; it may not be blank.

    Raises:
        UserError: there is none; the message names the keys that are present.
    """
    key = next((key for key in keys if values.get(key) is not None), keys[0])
    value = values.get(key)
    if isinstance(value, _RepeatedKey):
        raise UserError(f"has the key {quote(key)} more than once; keep one")
    if value is not None and not isinstance(value, str):
        kind = _JSON_TYPES.get(type(value), type(value).__name__)
        raise UserError(f"needs a text under {quote(key)}, not {kind}")
    if not value or not value.strip():
        wanted = " or ".join(map(quote, keys))
        raise UserError(f"needs a text under {wanted}; the keys are: {list_names(values)}")
    return check_text(value, f"under {quote(key)}")
