"""Where the rows of a data set are: in text files, in Parquet or Arrow files, or elsewhere."""

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.download import DownloadManager

from moma.data.sources import arrow_tables, row_files
from moma.data.sources.arrow_tables import check_columns, storage_error
from moma.data.sources.paths import expand_pattern
from moma.errors import UserError, list_names, quote, shorten

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Builders of `datasets` for text files, in place of which the rows are read here: they take
# values for numbers, dates or missing ones, or a column for an index.
_TEXT_BUILDERS = ("csv", "json", "text")
_BUILDERS_PACKAGE = "datasets.packaged_modules."


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a data set.

    Attributes:
        kind: "rows" of text files, a kind of Arrow file, or "other", which `datasets` knows.
        splits: the files of each split, empty for "other".
        separator: what separates the columns of CSV files, where it is declared.
        is_local: whether the files are on this machine.
    """

    kind: str
    splits: dict[str, list[str]]
    separator: str | None = None
    is_local: bool = True

    def rows(self, columns: list[str], split: str) -> Iterator[row_files.FileRow]:
        """Yield the rows of text files.

        Raises:
            UserError: a file cannot be read, or there is no such split.
        """
        if split in self.splits:
            yield from self._split_rows(split, columns)
            return
        counts = {name: sum(1 for _ in self._split_rows(name, columns)) for name in self.splits}
        for name, start, end in arrow_tables.ranges(split, counts):
            yield from islice(self._split_rows(name, columns), start, end)

    def _split_rows(self, split: str, columns: list[str]) -> Iterator[row_files.FileRow]:
        for path in self.splits[split]:
            ending = row_files.ending_of(path)
            yield from row_files.read_rows(path, ending, columns, self.separator)


def local_files(path: str) -> list[Path]:
    """Return the files that a path names or matches; none for a folder or a name on the hub.

    Raises:
        UserError: no file matches, or a file has an ending that cannot be read.
    """
    if Path(path).is_dir():
        return []
    known = (*row_files.ENDINGS, *arrow_tables.ENDINGS)
    is_pattern = any(character in path for character in "*?[")
    if not (Path(path).exists() or is_pattern or row_files.ending_of(path) in known):
        return []
    files = expand_pattern(Path(path))
    for file in files:
        if row_files.ending_of(str(file)) not in known:
            raise UserError(
                f"{file}: files with this ending cannot be read; those that can end in "
                f"{', '.join(known)}, the text files among them also in .gz, .bz2, .xz or .zst"
            )
    return files


def find_files(
    path: str, subset: str | None, revision: str | None, streaming: bool
) -> DatasetFiles:
    """Find the files of a data set.

    Args:
        path: a file, a pattern, a folder or a name on the hub.
        subset: the configuration of the data set, where it has several.
        revision: commit of the hub's repository.
        streaming: whether files of the hub are read without downloading them first.

    Raises:
        UserError: there is no such data set.
    """
    files = [str(file) for file in local_files(path)]
    if files:
        endings = {row_files.ending_of(file) for file in files}
        if endings <= set(row_files.ENDINGS):
            return DatasetFiles("rows", {"train": files})
        if len(endings) > 1:
            raise UserError(f"{path}: matches files of several kinds: {list_names(endings)}")
        return DatasetFiles(arrow_tables.ENDINGS[endings.pop()], {"train": files})
    is_local = Path(path).is_dir()
    if not is_local and not _HUB_NAME.fullmatch(path):
        known = ", ".join((*row_files.ENDINGS, *arrow_tables.ENDINGS))
        raise UserError(
            f"{shorten(path)}: is no file that ends in {known}, no folder, and no name on the hub "
            "such as owner/name; check the source's 'path'"
        )
    try:
        if is_local and glob.has_magic(path):
            raise UserError(
                f"{path}: `datasets` takes the folder's name for a pattern; rename the folder, or "
                f"name its files: {path}/*.parquet"
            )
        return _builder_files(path, subset, revision, streaming, is_local)
    except UserError:
        raise
    except Exception as error:  # whatever the files, the network and the library raise
        raise cannot_open(path, error) from error


def open_table(
    path: str,
    subset: str | None,
    revision: str | None,
    columns: list[str],
    split: str,
    streaming: bool,
) -> Any:
    """Open the columns of a data set that is not in text files, as Arrow tables.

    Raises:
        UserError: it cannot be opened, or lacks a column.
    """
    try:
        files = find_files(path, subset, revision, streaming)
        if files.kind == "other":
            opened = arrow_tables.load(
                path=path, name=subset, revision=revision, split=split, streaming=streaming
            )
        elif files.is_local:
            opened = arrow_tables.open_files(files.kind, files.splits, columns, split, streaming)
        else:
            opened = arrow_tables.load(
                path=files.kind, data_files=files.splits, split=split, streaming=streaming
            )
        found = opened.column_names or columns
    except UserError:
        raise
    except Exception as error:  # whatever the files, the network and the library raise
        raise cannot_open(path, error) from error
    check_columns(path, found, columns)
    # Arrow's own values: `datasets` would decode images, wherever their paths lead.
    return opened.select_columns(columns).with_format("arrow")


def cannot_open(path: str, error: Exception) -> UserError:
    """Return the error that says why a data set cannot be opened."""
    on_disk = storage_error(error)
    if on_disk is not None:
        return on_disk
    cause = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
    return UserError(f"{path}: `datasets` cannot open it ({shorten(cause)}){_advice(path)}")


def _advice(path: str) -> str:
    """What to do where a name on the hub cannot be opened."""
    if Path(path).is_dir() or local_files(path):
        return ""
    missing = f"; there is no file or folder {quote(path)} on this machine"
    if datasets.config.HF_HUB_OFFLINE:
        return f"{missing}, and HF_HUB_OFFLINE is set: unset it to ask the hub"
    return (
        f"{missing}, and a name on the hub needs a network, and for closed data sets a login: "
        "or download its files and give their path"
    )


def _builder_files(
    path: str, subset: str | None, revision: str | None, streaming: bool, is_local: bool
) -> DatasetFiles:
    """The files that `datasets` finds in a folder or in a repository of the hub."""
    arrow_tables.silence()
    builder = datasets.load_dataset_builder(path, name=subset, revision=revision)
    kind, config = _builder_kind(builder), builder.config
    splits = {str(split): list(files) for split, files in (config.data_files or {}).items()}
    endings = {row_files.ending_of(file) for files in splits.values() for file in files}
    is_text = kind in _TEXT_BUILDERS and endings <= set(row_files.ENDINGS)
    is_text = is_text and getattr(config, "field", None) is None
    is_arrow = kind in arrow_tables.ENDINGS.values()
    if not splits or not (is_text or is_arrow):
        return DatasetFiles("other", {}, is_local=is_local)
    if not is_local and not streaming:
        splits = DownloadManager().download(splits)
        is_local = True
    separator = getattr(config, "sep", None) if kind == "csv" else None
    if separator == "," and endings == {"tsv"}:
        separator = None
    return DatasetFiles("rows" if is_text else kind, splits, separator, is_local)


def _builder_kind(builder: datasets.DatasetBuilder) -> str:
    """The kind of files that a builder reads, by the module of its class or of a base class."""
    modules = [base.__module__ for base in type(builder).__mro__]
    found = [name for name in modules if name.startswith(_BUILDERS_PACKAGE)]
    return found[0].removeprefix(_BUILDERS_PACKAGE).partition(".")[0] if found else ""
