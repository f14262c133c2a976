"""Rows of text files: JSON Lines, JSON, CSV, TSV and plain lines, compressed or not.

Values stay as they are written: nothing is taken for a number, a date or a missing value, and a
row whose fields do not fit the header is rejected. Compression is recognized by the content.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec

from moma.data.sources.jsonl import (
    JSON_DECODER,
    Line,
    decompress,
    iterate_lines,
    object_of,
    parse_json_object,
)
from moma.data.sources.parts import Cut, line_cuts, whole_file
from moma.data.sources.paths import FileRange, read_errors
from moma.data.sources.reading import MAX_ROW_BYTES
from moma.errors import UserError, list_names, quote, shorten
from moma.files import open_regular

ENDINGS = ("jsonl", "ndjson", "json", "csv", "tsv", "txt")
_LINE_ENDINGS = ("jsonl", "ndjson", "txt")
# Lists of images, and their column of paths, in image folders of the library `datasets`.
METADATA_FILES, FILE_NAME = ("metadata.jsonl", "metadata.csv"), "file_name"
_COMPRESSED = re.compile(r"\.(gz|zst|xz|bz2)$", re.IGNORECASE)
_CHUNK_CHARACTERS = 2**16
_BETWEEN_ITEMS = re.compile(r"[, \t\r\n]*")
_T = TypeVar("_T")


@dataclass(frozen=True)
class FileRow:
    """A row of a file: the file, the row's location for messages, and what returns its columns.

    `values` raises `UserError` if the row has none.
    """

    path: str
    location: str
    values: Callable[[], dict[str, Any]]


def ending_of(path: str) -> str:
    """Return the ending of a file's name in lower case, without that of a compression."""
    return Path(_COMPRESSED.sub("", path)).suffix[1:].lower()


def row_cuts(path: Path, part_bytes: int, row_bytes: int) -> Iterator[Cut]:
    """Yield where `read_rows` can begin in a file of lines: CSV and JSON are read whole."""
    if ending_of(str(path)) in _LINE_ENDINGS:
        return line_cuts(path, part_bytes, row_bytes)
    return whole_file(path)


def read_rows(
    path: str,
    columns: list[str],
    separator: str | None = None,
    lines: FileRange | None = None,
) -> Iterator[FileRow]:
    """Yield the rows of a file whose ending is one of `ENDINGS`; blank lines are no rows.

    Args:
        path: the file, or a URL that fsspec opens.
        columns: columns that a CSV file must have; other columns may hold anything.
        separator: what separates the columns of a CSV file, if not a comma.
        lines: the range that is read of a file that `row_cuts` cuts.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    ending = ending_of(path)
    is_url = "://" in path
    with read_errors(path), fsspec.open(path, "rb") if is_url else open_regular(path) as raw:
        file = decompress(io.BufferedReader(raw) if is_url else raw)
        if ending in ("csv", "tsv"):
            default = "\t" if ending == "tsv" else ","
            yield from _csv_rows(path, file, columns, separator or default)
        elif ending == "json":
            yield from _json_rows(path, file)
        else:
            yield from _line_rows(path, file, ending != "txt", lines)


def check_columns(path: str, found: list[str], columns: list[str], note: str = "") -> None:
    """Raise `UserError` unless a table has each of the columns that are used once."""
    for column in columns:
        if found.count(column) != 1:
            problem = "several columns" if column in found else "no column"
            raise UserError(
                f"{path}: has {problem} {quote(column)}; the columns{note} are: {list_names(found)}"
            )


def named_images(rows: Iterable[_T], images_of: Callable[[_T], Iterable[Path]]) -> Iterator[Path]:
    """Yield the image files that rows name, without rows for which `images_of` fails."""
    for row in rows:
        try:
            yield from images_of(row)
        except UserError:
            continue  # The file's own size and time cover rows that are rejected.


def _line_rows(
    path: str, file: io.BufferedReader, is_json: bool, lines: FileRange | None = None
) -> Iterator[FileRow]:
    for line in iterate_lines(file, path, lines):
        if not line.is_blank:
            yield FileRow(path, line.location, line.values if is_json else partial(_text_of, line))


def _text_of(line: Line) -> dict[str, Any]:
    return {"text": line.text().strip("\r\n")}


def _text(file: io.BufferedReader) -> io.TextIOWrapper:
    """The file as text: UTF-8 or, as spreadsheets export it, UTF-16 with a byte-order mark.

    Bytes that are neither become surrogates, so that only the rows that hold them are rejected.
    """
    if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return io.TextIOWrapper(file, "utf-16", errors="replace", newline="")
    return io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")


def _csv_rows(
    path: str, file: io.BufferedReader, columns: list[str], separator: str
) -> Iterator[FileRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _BoundedLines(path, _text(file))
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        lines.begin_row(line)
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            reason = f"not valid CSV ({error}); fix or remove the row"
            if header is None or "end of data" in str(error) or "limit" in str(error):
                # The rest of the file is inside of a quotation that is not closed.
                raise UserError(f"{path}, line {line}: {reason}") from error
            # An open quotation may have consumed several lines, each of them a row.
            for number in range(line, reader.line_num + 1):
                yield FileRow(path, f"{path}, line {number}", partial(_fail, reason))
            continue
        if header is None:
            header = fields
            check_columns(path, header, columns, f", separated by {separator!r},")
        elif fields:
            yield FileRow(path, f"{path}, line {line}", partial(_csv_values, header, fields))
    if header is None:
        raise UserError(f"{path}: is empty; its first line must name the columns")


class _BoundedLines(Iterator[str]):
    """The lines of a text; a row without an end, of one line or many, must not fill the memory."""

    def __init__(self, path: str, text: io.TextIOWrapper):
        self._path, self._text = path, text

    def begin_row(self, line: int) -> None:
        """Count the characters of the row that begins in a line."""
        self._row, self._left = line, MAX_ROW_BYTES

    def __next__(self) -> str:
        line = self._text.readline(self._left)
        self._left -= len(line)
        if not self._left:
            raise UserError(
                f"{self._path}, line {self._row}: longer than {MAX_ROW_BYTES >> 20} MiB; split the "
                "row, or close its quotation"
            )
        if not line:
            raise StopIteration
        return line


def _csv_values(header: list[str], fields: list[str]) -> dict[str, Any]:
    if any(fields[len(header) :]):
        raise UserError(
            f"has {len(fields)} fields, but the header names {len(header)} columns; "
            "quote a field that contains the separator"
        )
    return object_of(list(zip(header, fields, strict=False)))


def _fail(reason: str) -> dict[str, Any]:
    raise UserError(reason)


def _json_rows(path: str, file: io.BufferedReader) -> Iterator[FileRow]:
    """The rows of JSON Lines, of an array of rows, or of one object."""
    lines = file.peek(_CHUNK_CHARACTERS).removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n")
    if lines[0].startswith(b"["):
        for number, item in enumerate(_array_items(path, _text(file)), start=1):
            yield FileRow(path, f"{path}, row {number}", partial(_item_values, item))
    elif len(lines) == 1 or _is_json(lines[0]) or lines[1].startswith(b"{"):
        yield from _line_rows(path, file, is_json=True)
    else:
        for number, values in enumerate(_object_rows(path, file), start=1):
            yield FileRow(path, f"{path}, row {number}", partial(dict, values))


def _is_json(line: bytes) -> bool:
    try:
        parse_json_object(line)
    except UserError:
        return False
    return True


def _object_rows(path: str, file: io.BufferedReader) -> list[dict[str, Any]]:
    """The rows of an object over several lines: its lists are columns, or it is a row."""
    data = file.read(MAX_ROW_BYTES + 1)
    if len(data) > MAX_ROW_BYTES:
        raise UserError(f"{path}: longer than {MAX_ROW_BYTES >> 20} MiB; write one row in a line")
    try:
        columns = parse_json_object(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    is_table = columns and all(isinstance(column, list) for column in columns.values())
    if not is_table or len({len(column) for column in columns.values()}) > 1:
        return [columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _array_items(path: str, text: io.TextIOWrapper) -> Iterator[Any]:
    """The items of a JSON array, of which one at a time is in memory."""
    buffer, is_whole, number = text.read(_CHUNK_CHARACTERS), False, 1
    position = buffer.index("[") + 1
    while True:
        position = cast(re.Match[str], _BETWEEN_ITEMS.match(buffer, position)).end()
        if buffer.startswith("]", position):
            if (buffer[position + 1 :] + text.read(MAX_ROW_BYTES)).strip():
                raise UserError(f"{path}: has text after its JSON array; write one row in a line")
            return
        try:
            item, end = JSON_DECODER.raw_decode(buffer, position)
            # A number or a literal may continue in the next chunk.
            if end == len(buffer) and not is_whole:
                raise ValueError("the chunk ends")
        except (ValueError, RecursionError) as error:
            buffer, position = buffer[position:], 0
            if is_whole or isinstance(error, RecursionError) or len(buffer) > MAX_ROW_BYTES:
                raise UserError(
                    f"{path}, row {number}: not valid JSON, or longer than "
                    f"{MAX_ROW_BYTES >> 20} MiB; fix the file"
                ) from error
            # Twice as much each time: a long item is not parsed again for every chunk.
            more = text.read(max(_CHUNK_CHARACTERS, len(buffer)))
            buffer, is_whole = buffer + more, not more
            continue
        yield item
        number, position = number + 1, end


def _item_values(item: Any) -> dict[str, Any]:
    if isinstance(item, str):
        return {"text": item}
    if not isinstance(item, dict):
        found = shorten(json.dumps(item, default=str), 60)
        raise UserError(f"is not a JSON object but {found}; fix or remove the row")
    return item
