"""Reading files line by line, and JSON Lines: a JSON object on every line."""

import bz2
import gzip
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from moma.data.sources.paths import FileRange, read_errors
from moma.data.sources.reading import MAX_ROW_BYTES, check_text
from moma.errors import UserError, json_error_message, list_names, quote
from moma.files import open_regular

_BLOCK_BYTES = 2**16


class _Streams(io.RawIOBase):
    """The content of compressed streams that follow each other, with zeros between or after them.

    `BZ2File` and `LZMAFile` end without an error at the first stream that is damaged.
    """

    def __init__(
        self,
        file: io.BufferedReader,
        decompressor: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor],
    ) -> None:
        self._file, self._decompressor = file, decompressor
        self._stream, self._position = decompressor(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._stream.eof:
                more = self._stream.unused_data.lstrip(b"\0")
                while not more and (block := self._file.read(_BLOCK_BYTES)):
                    more = block.lstrip(b"\0")
                if not more:
                    return 0
                self._stream = self._decompressor()
            else:
                more = self._file.read(_BLOCK_BYTES) if self._stream.needs_input else b""
                if self._stream.needs_input and not more:
                    raise EOFError("it is cut off")
            data = self._stream.decompress(more, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence != io.SEEK_SET:
            raise io.UnsupportedOperation("seeking from the end of compressed data")
        if offset < self._position:
            self._file.seek(0)
            self._stream, self._position = self._decompressor(), 0
        while self._position < offset and self.read(min(_BLOCK_BYTES, offset - self._position)):
            pass
        return self._position


_DECOMPRESS: dict[bytes, Callable[[io.BufferedReader], Any]] = {
    rb"\x1f\x8b\x08": lambda file: gzip.GzipFile(fileobj=file),
    rb"\xfd7zXZ\x00": lambda file: _Streams(file, partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)),
    # A frame of Zstandard, or one that is to be skipped.
    rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18": lambda file: pa.CompressedInputStream(
        pa.PythonFile(file), "zstd"
    ),
    rb"BZh\d(1AY&SY|\x17rE8P\x90)": lambda file: _Streams(file, bz2.BZ2Decompressor),
}


def decompress(file: io.BufferedReader) -> io.BufferedReader:
    """Return the content of a gzip, xz, Zstandard or bzip2 file; of another, the file itself."""
    start = file.peek(10)
    for magic, opener in _DECOMPRESS.items():
        if re.match(magic, start):
            return io.BufferedReader(opener(file))
    return file


def decode(data: bytes, encoding: str = "utf-8-sig", errors: str = "strict") -> str:
    """Return UTF-8 as text; raises `UserError` if the bytes are something else."""
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error}); convert the file to UTF-8") from error


@dataclass(frozen=True)
class Line:
    """A line of a file.

    Attributes:
        path: the file.
        number: line number, from 1.
        offset: offset in the file in bytes.
        data: the line with its line break; None if it is longer than `MAX_ROW_BYTES`.
    """

    path: Path | str
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
        """Return the line; raises `UserError` if it is too long."""
        if self.data is None:
            raise UserError(f"longer than {MAX_ROW_BYTES >> 20} MiB; split or remove it")
        return self.data

    def text(self) -> str:
        """Return the line as text; raises `UserError` if it is too long or not UTF-8."""
        return decode(self.content(), "utf-8-sig" if self.number == 1 else "utf-8")

    def values(self) -> dict[str, Any]:
        """Return the line's JSON object; raises `UserError` if it is too long or not one."""
        return parse_json_object(self.content())


def read_lines(lines: FileRange) -> Iterator[Line]:
    """Yield lines of a file; raises `UserError` if it cannot be read or is compressed."""
    path = lines.path
    with read_errors(path), open_regular(path) as file:
        if decompress(file) is not file:
            raise UserError(f"{path}: cannot read it (it is compressed); decompress it first")
        yield from iterate_lines(file, path, lines)


def iterate_lines(
    file: BinaryIO, path: Path | str, lines: FileRange | None = None
) -> Iterator[Line]:
    """Yield the lines of an open file, or those in a range; `path` is its name in messages."""
    number, offset, end = (lines.row, lines.begin, lines.end) if lines else (0, 0, None)
    if offset:
        file.seek(offset)
    while (end is None or offset < end) and (data := file.readline(MAX_ROW_BYTES + 1)):
        number += 1
        yield Line(path, number, offset, data if len(data) <= MAX_ROW_BYTES else None)
        offset += len(data)
        while data and not data.endswith(b"\n"):
            data = file.readline(MAX_ROW_BYTES)
            offset += len(data)


def read_jsonl(files: Iterable[FileRange]) -> Iterator[Line]:
    """Yield the lines of JSON Lines files that are not blank."""
    return (line for lines in files for line in read_lines(lines) if not line.is_blank)


class _RepeatedKey:
    """The value of a key that an object has more than once, where `json` would keep the last."""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of keys and values; a key that is repeated raises in `require_text`."""
    values: dict[str, Any] = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        values |= {key: _RepeatedKey() for key, count in counts.items() if count > 1}
    return values


_JSON_TYPES = {dict: "an object", list: "a list", bool: "a boolean", float: "a number"}
# Integers become floats, since Python refuses those of more than 4,300 digits.
JSON_DECODER = json.JSONDecoder(parse_int=float, object_pairs_hook=object_of)


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Return a JSON object; raises `UserError` if the data are not one in UTF-8."""
    try:
        values = JSON_DECODER.decode(decode(data, errors="surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"not valid JSON ({json_error_message(error)}); fix or remove the row"
        ) from error
    if not isinstance(values, dict):
        raise UserError('not a JSON object; write one such as {"image": "1.png", "caption": "…"}')
    return values


def require_text(values: dict[str, Any], *keys: str) -> str:
    """Return the text under the first of several keys that is present.

    Raises:
        UserError: there is none, or it is blank.
    """
    key = next((key for key in keys if values.get(key) is not None), keys[0])
    value = values.get(key)
    if isinstance(value, _RepeatedKey):
        raise UserError(f"has the key {quote(key)} more than once; keep one")
    if value is not None and not isinstance(value, str):
        kind = _JSON_TYPES.get(type(value), type(value).__name__)
        raise UserError(f"needs a text under {quote(key)}, not {kind}; fix or remove the row")
    if not value or not value.strip():
        wanted = " or ".join(map(quote, keys))
        raise UserError(f"needs a text under {wanted}; the keys are: {list_names(values)}")
    return check_text(value, f"under {quote(key)}")
