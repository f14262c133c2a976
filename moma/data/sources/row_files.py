"""Rows of text files: JSON Lines, JSON, CSV, TSV and plain lines, compressed or not.

Values stay as they are written: nothing is taken for a number, a date or a missing value, and a
row whose fields do not fit the header is rejected. Compression is recognized by the content.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from moma.data.sources.jsonl import JSON_DECODER, Line, iterate_lines, parse_json_object
from moma.data.sources.reading import MAX_ROW_BYTES
from moma.errors import UserError, list_names, quote, shorten

ENDINGS = ("jsonl", "ndjson", "json", "csv", "tsv", "txt")
_COMPRESSED = re.compile(r"\.(gz|zst|xz|bz2)$", re.IGNORECASE)
_CHUNK_CHARACTERS = 2**16


@dataclass(frozen=True)
class FileRow:
    """A row of a file.

    Attributes:
        location: file and row, for messages.
        values: returns the row's columns; raises `UserError` if it has none.
    """

    location: str
    values: Callable[[], dict[str, Any]]


def ending_of(path: str) -> str:
    """Return the ending of a file's name in lower case, without that of a compression."""
    return Path(_COMPRESSED.sub("", path)).suffix[1:].lower()


def read_rows(
    path: str, ending: str, columns: list[str], separator: str | None = None
) -> Iterator[FileRow]:
    """Yield the rows of a file; blank lines are no rows.

    Args:
        path: the file, or a URL that fsspec opens.
        ending: one of `ENDINGS`.
        columns: columns that are needed; other columns may hold anything.
        separator: what separates the columns of a CSV file, if not a comma.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    try:
        with _open(path) as raw, _decompress(raw) as file:
            if ending in ("csv", "tsv"):
                default = "\t" if ending == "tsv" else ","
                yield from _csv_rows(path, file, columns, separator or default)
            elif ending == "json":
                yield from _json_rows(path, file)
            else:
                yield from _line_rows(path, file, is_json=ending != "txt")
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read it ({shorten(str(reason))})") from error


def _open(path: str) -> Any:
    return fsspec.open(path, "rb") if "://" in path else open(path, "rb")


def _decompress(file: BinaryIO) -> BinaryIO:
    buffered = io.BufferedReader(cast(io.RawIOBase, file))
    start = buffered.peek(6)
    if start.startswith(b"\x1f\x8b"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=buffered))
    if start.startswith(b"BZh"):
        return cast(BinaryIO, bz2.BZ2File(buffered))
    if start.startswith(b"\xfd7zXZ\x00"):
        return cast(BinaryIO, lzma.LZMAFile(buffered))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        stream = pa.CompressedInputStream(pa.PythonFile(buffered), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream))
    return buffered


def _text(file: BinaryIO) -> io.TextIOWrapper:
    """The file as text: UTF-8 or, as spreadsheets export it, UTF-16 with a byte-order mark.

    Bytes that are neither become surrogates, so that only the rows that hold them are rejected.
    """
    buffered = io.BufferedReader(cast(io.RawIOBase, file))
    is_utf16 = buffered.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
    if is_utf16:
        return io.TextIOWrapper(buffered, "utf-16", errors="replace", newline="")
    return io.TextIOWrapper(buffered, "utf-8-sig", errors="surrogateescape", newline="")


def _line_rows(path: str, file: BinaryIO, is_json: bool) -> Iterator[FileRow]:
    for line in iterate_lines(file, Path(path)):
        if not line.is_blank:
            location = f"{path}, row {line.number}"
            if is_json:
                yield FileRow(location, line.values)
            else:
                yield FileRow(location, partial(_line_values, line))


def _line_values(line: Line) -> dict[str, Any]:
    return {"text": line.text().strip("\r\n")}


def _csv_rows(path: str, file: BinaryIO, columns: list[str], separator: str) -> Iterator[FileRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_bounded_lines(path, _text(file)), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            reason = f"not valid CSV ({error}); fix or remove the row"
            if header is None or "end of data" in str(error) or "limit" in str(error):
                # The rest of the file is inside of a quotation that is not closed.
                raise UserError(f"{path}, line {line}: {reason}") from error
            # Each line is a row that is lost, where an open quotation has taken several.
            for lost in range(line, reader.line_num + 1):
                yield FileRow(f"{path}, line {lost}", _failing(reason))
            continue
        if header is None:
            header = fields
            _check_header(path, header, columns, separator)
        elif fields:
            yield FileRow(f"{path}, line {line}", _csv_values(header, fields, columns))
    if header is None:
        raise UserError(f"{path}: is empty; its first line must name the columns")


def _bounded_lines(path: str, text: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a text; one without line breaks must not fill the memory."""
    for number in itertools.count(1):
        line = text.readline(MAX_ROW_BYTES)
        if len(line) == MAX_ROW_BYTES:
            raise UserError(f"{path}, line {number}: longer than {MAX_ROW_BYTES >> 20} MiB")
        if not line:
            return
        yield line


def _check_header(path: str, header: list[str], columns: list[str], separator: str) -> None:
    for column in columns:
        if header.count(column) != 1:
            problem = "several columns" if column in header else "no column"
            raise UserError(
                f"{path}: has {problem} {quote(column)}; the columns, separated by "
                f"{separator!r}, are: {list_names(header)}"
            )


def _csv_values(
    header: list[str], fields: list[str], columns: list[str]
) -> Callable[[], dict[str, Any]]:
    if any(fields[len(header) :]):
        return _failing(
            f"has {len(fields)} fields, but the header names {len(header)} columns; "
            "quote a field that contains the separator"
        )
    values: dict[str, Any] = dict(zip(header, fields, strict=False))
    for column in columns:
        if re.search("[\ud800-\udfff]", values.get(column, "")):
            return _failing(f"the column {quote(column)} is not UTF-8; convert the file to UTF-8")
    return lambda: values


def _failing(reason: str) -> Callable[[], dict[str, Any]]:
    def fail() -> dict[str, Any]:
        raise UserError(reason)

    return fail


def _json_rows(path: str, file: BinaryIO) -> Iterator[FileRow]:
    """The rows of JSON Lines, of an array of rows, or of one object."""
    buffered = io.BufferedReader(cast(io.RawIOBase, file))
    start = buffered.peek(_CHUNK_CHARACTERS)
    lines = start.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n")
    if lines[0].startswith(b"["):
        for number, item in enumerate(_array_items(path, _text(buffered)), start=1):
            yield FileRow(f"{path}, row {number}", _item_values(item))
    elif len(lines) == 1 or _is_json(lines[0]) or lines[1].startswith(b"{"):
        yield from _line_rows(path, buffered, is_json=True)
    else:
        yield from _object_rows(path, buffered)


def _is_json(line: bytes) -> bool:
    try:
        parse_json_object(line)
    except UserError:
        return False
    return True


def _object_rows(path: str, file: BinaryIO) -> Iterator[FileRow]:
    """The rows of an object over several lines: its lists are columns, or it is a row."""
    data = file.read(MAX_ROW_BYTES + 1)
    if len(data) > MAX_ROW_BYTES:
        raise UserError(f"{path}: longer than {MAX_ROW_BYTES >> 20} MiB; write one row in a line")
    try:
        columns = parse_json_object(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    is_table = columns and all(isinstance(column, list) for column in columns.values())
    if is_table and len({len(column) for column in columns.values()}) == 1:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    else:
        rows = [columns]
    for number, row in enumerate(rows, start=1):
        yield FileRow(f"{path}, row {number}", partial(dict, row))


def _array_items(path: str, text: io.TextIOWrapper) -> Iterator[Any]:
    """The items of a JSON array, of which one at a time is in memory."""
    buffer, position, is_whole, number = text.read(_CHUNK_CHARACTERS), 0, False, 0
    position = buffer.index("[") + 1
    while True:
        position += len(buffer) - position - len(buffer[position:].lstrip(", \t\r\n"))
        if buffer.startswith("]", position):
            return
        try:
            item, end = JSON_DECODER.raw_decode(buffer, position)
            # A number or a literal may go on in the next chunk.
            if end == len(buffer) and not is_whole:
                raise ValueError("the chunk ends")
        except (ValueError, RecursionError) as error:
            if is_whole or isinstance(error, RecursionError):
                raise UserError(
                    f"{path}, row {number + 1}: not valid JSON; fix the file"
                ) from error
            buffer, position = buffer[position:], 0
            if len(buffer) > MAX_ROW_BYTES:
                raise UserError(
                    f"{path}, row {number + 1}: not valid JSON, or longer than "
                    f"{MAX_ROW_BYTES >> 20} MiB; fix the file"
                ) from error
            # Twice as much each time: a long item is not parsed again for every chunk.
            more = text.read(max(_CHUNK_CHARACTERS, len(buffer)))
            buffer, is_whole = buffer + more, not more
            continue
        number, position = number + 1, end
        yield item


def _item_values(item: Any) -> Callable[[], dict[str, Any]]:
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        return _failing(f"is not a JSON object but {shorten(json.dumps(item, default=str), 60)}")
    return lambda: item
