"""Columns of Parquet and Arrow files and of other data sets, opened by the library `datasets`.

Only the columns that are used are read, so that the others may be of any type and differ between
files. Parquet is copied once into the library's cache of memory-mapped Arrow files; Arrow files
are memory-mapped where they are.
"""

import errno
import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from moma.data.sources.parts import Cut, Cuts
from moma.data.sources.paths import FileRange, read_error, read_errors
from moma.data.sources.row_files import check_columns
from moma.errors import StorageError, UserError, shorten, storage_error

ENDINGS = {"parquet": "parquet", "arrow": "arrow"}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_DISK_FULL_MESSAGES = ("No space left on device", "Not enough disk space")
_REMEDY = "replace or remove the file"


def open_files(
    kind: str, files: dict[str, list[str]], columns: list[str], split: str, streaming: bool
) -> Any:
    """Return a data set of `datasets` of the columns of local files.

    Args:
        kind: a value of `ENDINGS`.
        files: the files of each split.
        streaming: whether to read Parquet without a copy in the cache.

    Raises:
        UserError: a file cannot be read or lacks a column, or the types of a column differ.
    """
    named = re.findall(r"\w[\w.]*", split)
    used = {name: paths for name, paths in files.items() if name in named} or files
    with_rows, schema = _common_schema(kind, used, columns)
    if kind == "arrow":
        parts = {name: _arrow_data(paths, columns, schema) for name, paths in with_rows.items()}
        chosen = ranges(split, {name: len(part) for name, part in parts.items()})
        return datasets.concatenate_datasets(
            [parts[name].select(range(start, end)) for name, start, end in chosen]
        )
    return datasets.load_dataset(
        path=kind,
        # The library expands patterns, and a name may look like one.
        data_files={name: [*map(glob.escape, paths)] for name, paths in with_rows.items()},
        columns=columns,
        features=datasets.Features.from_arrow_schema(schema),
        split=split,
        streaming=streaming,
    )


def parquet_features(paths: list[str], columns: list[str]) -> datasets.Features:
    """Return the types of the columns of Parquet files; raises `UserError` as `open_files`."""
    return datasets.Features.from_arrow_schema(_common_schema("parquet", {"": paths}, columns)[1])


def row_group_cuts(columns: list[str]) -> Cuts:
    """Return what yields where a Parquet file can be cut: between row groups."""

    def cuts_of(path: Path) -> Iterator[Cut]:
        with read_errors(path, _REMEDY), pa.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        rows = 0
        for number, group in enumerate(groups, 1):
            rows += group.num_rows
            is_last = number == len(groups)
            yield Cut(number, 0 if is_last else rows, _group_bytes(group, columns))
        if not groups:
            yield Cut(0, 0, 0)

    return cuts_of


def _group_bytes(group: pa.parquet.RowGroupMetaData, columns: list[str]) -> int:
    # A path is a column and its fields, joined by dots, which the names may have, too.
    beginnings = tuple(f"{column}." for column in columns)
    chunks = (group.column(index) for index in range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if f"{chunk.path_in_schema}.".startswith(beginnings)
    )


def read_row_groups(
    ranges: Iterable[FileRange], columns: list[str], rows: int
) -> Iterator[tuple[Path, int, pa.RecordBatch]]:
    """Yield ranges of row groups of Parquet files: at most `rows` rows at a time.

    With each come its file, and how many rows of the file are before it.
    """
    for path, begin, end, before in ranges:
        with read_errors(path, _REMEDY), pa.parquet.ParquetFile(path) as file:
            groups = range(begin, file.metadata.num_row_groups if end is None else end)
            for table in file.iter_batches(rows, [*groups], columns):
                yield path, before, table
                before += table.num_rows


def row_locations(kind: str, paths: Iterable[Path], begin: int = 0) -> Iterator[str]:
    """Yield the file and the number, from 1, of each row of files of a kind of `ENDINGS`.

    The first `begin` rows of all files together are left out.
    """
    for path in paths:
        rows = _schema_and_rows(kind, str(path))[1]
        yield from (f"{path}, row {number}" for number in range(begin + 1, rows + 1))
        begin = max(begin - rows, 0)


def ranges(split: str, rows: dict[str, int]) -> list[tuple[str, int, int]]:
    """Return the ranges (split, start, end) that a name such as `train[:9]` stands for.

    `rows` is the number of rows of each split.

    Raises:
        ValueError: there is no such split, or the range is not valid.
    """
    return [
        (part.splitname, part.from_ or 0, rows[part.splitname] if part.to is None else part.to)
        for part in datasets.ReadInstruction.from_spec(split).to_absolute(rows)
    ]


def cause_on_disk(path: str, error: BaseException) -> StorageError | None:
    """Return the error of the disk that caused another error, if there is one.

    `datasets` reports a full disk as an error of the file that it was reading.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        is_full = isinstance(cause, OSError) and cause.errno in _DISK_FULL
        if is_full or any(message in text for message in _DISK_FULL_MESSAGES):
            return StorageError(
                f"{datasets.config.HF_DATASETS_CACHE}: {shorten(text, 200)}; this is the cache of "
                "`datasets`: free space on its disk, set HF_DATASETS_CACHE to a folder on another "
                "disk, or set streaming = true, and run the same command again"
            )
        if described := storage_error(cause, path):
            return described
        cause = cause.__cause__ or cause.__context__
    return None


def _common_schema(
    kind: str, files: dict[str, list[str]], columns: list[str]
) -> tuple[dict[str, list[str]], pa.Schema]:
    """The files of each split that have rows, or one of them, and the types of the columns."""
    with_rows: dict[str, list[str]] = {}
    schemas: list[pa.Schema] = []
    for split, paths in files.items():
        found = {path: _schema_and_rows(kind, path) for path in paths}
        with_rows[split] = [path for path in paths if found[path][1]] or paths[-1:]
        for path in with_rows[split]:
            schema = found[path][0]
            check_columns(path, schema.names, columns)
            used = pa.schema([pa.field(name, _plain(schema.field(name).type)) for name in columns])
            try:
                schemas = [pa.unify_schemas([*schemas, used], promote_options="permissive")]
            except pa.ArrowException as error:
                raise UserError(
                    f"{path}: a column has another type than in the other files "
                    f"({shorten(str(error), 200)}); convert the files to one type"
                ) from error
    return with_rows, schemas[0]


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values, where files store them in another way."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return views.get(kind, kind)


def _schema_and_rows(kind: str, path: str) -> tuple[pa.Schema, int]:
    try:
        if kind == "arrow":
            table = _arrow_table(path)
            return table.schema, table.num_rows
        with pa.parquet.ParquetFile(path) as file:
            return file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise cause_on_disk(path, error) or read_error(path, error, _REMEDY) from error


def _arrow_data(paths: list[str], columns: list[str], schema: pa.Schema) -> datasets.Dataset:
    tables = []
    for path in paths:
        table = _arrow_table(path).select(columns)
        try:
            table.validate(full=True)
        except pa.ArrowException as error:
            reason = shorten(str(error), 300)
            raise UserError(f"{path}: is damaged ({reason}); {_REMEDY}") from error
        tables.append(datasets.table.table_cast(table, schema))
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables)))


def _arrow_table(path: str) -> pa.Table:
    source = pa.memory_map(path)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()
