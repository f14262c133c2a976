"""Where the rows of a data set are: in text files, in Parquet or Arrow files, or elsewhere."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import ALL_DEFAULT_PATTERNS, FILES_TO_IGNORE, resolve_pattern
from datasets.download import DownloadManager
from huggingface_hub import DatasetCard

from moma.data.documents import SourcePart
from moma.data.sources import arrow_tables, row_files
from moma.data.sources.arrow_tables import cause_on_disk
from moma.data.sources.jsonl import require_text
from moma.data.sources.listings import listed_once
from moma.data.sources.parts import ranges_of
from moma.data.sources.paths import FileRange, expand_pattern, files_below, outputs_below
from moma.errors import UserError, list_names, quote, shorten

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_ENDINGS = (*row_files.ENDINGS, *arrow_tables.ENDINGS)
# Builders of `datasets` that are not used: they guess that values are numbers, dates or missing,
# or that a column is an index.
_TEXT_BUILDERS = ("csv", "json", "text")
_BUILDERS_PACKAGE = "datasets.packaged_modules."
# Files that accompany data.
_NO_DATA_NAMES = (*FILES_TO_IGNORE, datasets.config.DATASET_STATE_JSON_FILENAME)
_NO_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|requirements)(?![a-z]).*\.txt", re.IGNORECASE
)
# Options of a README that are heeded, or that do not matter where values stay as they are written.
_HEEDED = (
    *("name", "version", "description", "data_dir", "data_files", "features"),
    *("sep", "delimiter", "columns", "batch_size", "chunksize"),
    *("keep_default_na", "na_filter", "na_values", "true_values", "false_values"),
    *("thousands", "decimal", "date_format", "float_precision"),
    *("engine", "low_memory", "memory_map", "use_threads", "block_size"),
)
_UTF_8 = ("utf-8", "utf8", "utf-8-sig")
_WHOLE = SourcePart()


@dataclass(frozen=True)
class DatasetFiles:
    """The files of a data set.

    Attributes:
        kind: "rows" of text files, a kind of Arrow file, or "other", which `builder` reads.
        splits: the files of each split.
        separator: what separates the columns of CSV files, where it is declared.
        builder: the builder of `datasets`.
        image_folder: the folder of images that the rows of metadata files describe.
    """

    kind: str
    splits: dict[str, list[str]]
    separator: str | None = None
    builder: Any = None
    image_folder: Path | None = None

    def local(self, split: str) -> list[Path]:
        """Return the files of a split; none if it is a range, or is not on this machine."""
        files = self.splits.get(split, ())
        return [] if any("://" in file for file in files) else [*map(Path, files)]

    def rows(self, columns: list[str], split: str, part: SourcePart) -> Iterator[row_files.FileRow]:
        """Yield the rows of text files; raises `ValueError` if there is no such split."""
        if split in self.splits:
            yield from self._split_rows(split, columns, part)
            return
        counts = {name: sum(1 for _ in self._split_rows(name, columns)) for name in self.splits}
        for name, start, end in arrow_tables.ranges(split, counts):
            yield from islice(self._split_rows(name, columns), start, end)

    def _split_rows(
        self, split: str, columns: list[str], part: SourcePart = _WHOLE
    ) -> Iterator[row_files.FileRow]:
        chosen: list[tuple[str, FileRange | None]] = [(path, None) for path in self.splits[split]]
        if part.stop is not None:
            chosen = [(str(lines.path), lines) for lines in ranges_of(self.local(split), part)]
        for path, lines in chosen:
            if self.image_folder is None:
                yield from row_files.read_rows(path, columns, self.separator, lines)
                continue
            for row in row_files.read_rows(path, [row_files.FILE_NAME], lines=lines):
                yield replace(row, values=partial(_with_images, row, self.image_folder))

    def table(self, columns: list[str], split: str, streaming: bool) -> Any:
        """Return a data set of `datasets` with at least the columns that are used."""
        if self.kind == "other" and streaming:
            return self.builder.as_streaming_dataset(split=split)
        if self.kind == "other":
            self.builder.download_and_prepare()
            return self.builder.as_dataset(split=split)
        if any("://" in file for files in self.splits.values() for file in files):
            return datasets.load_dataset(
                path=self.kind, data_files=self.splits, split=split, streaming=streaming
            )
        return arrow_tables.open_files(self.kind, self.splits, columns, split, streaming)


@listed_once
def local_files(path: str) -> list[Path]:
    """Return the files that a path names or matches; none for a folder or a name on the hub.

    Raises:
        UserError: no file matches, or one has an ending that cannot be read.
    """
    is_pattern = any(character in path for character in "*?[")
    is_file = Path(path).exists() or is_pattern or row_files.ending_of(path) in _ENDINGS
    if Path(path).is_dir() or not is_file:
        return []
    files = expand_pattern(Path(path))
    for file in files:
        if row_files.ending_of(str(file)) not in _ENDINGS:
            raise UserError(
                f"{file}: files with this ending cannot be read; those that can end in "
                f"{', '.join(_ENDINGS)}, the text files among them also in .gz, .bz2, .xz or .zst"
            )
    return files


@listed_once
def find_files(
    path: str, subset: str | None, revision: str | None, streaming: bool
) -> DatasetFiles:
    """Find the files of a data set; the arguments are keys of `DatasetConfig`.

    Raises:
        UserError: there is no such data set, or it would be read by guesses.
    """
    # Without progress bars, and without logging errors that are raised, too.
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    files = [str(file) for file in local_files(path)]
    if files:
        endings = {row_files.ending_of(file) for file in files}
        if endings <= set(row_files.ENDINGS):
            return DatasetFiles("rows", {"train": files})
        if len(endings) > 1:
            names = list_names(endings)
            raise UserError(f"{path}: matches files of several kinds ({names}); name those of one")
        return DatasetFiles(arrow_tables.ENDINGS[endings.pop()], {"train": files})
    is_local = Path(path).is_dir()
    if not is_local and not _HUB_NAME.fullmatch(path):
        raise UserError(
            f"{shorten(path)}: is no file that ends in {', '.join(_ENDINGS)}, no folder, and no "
            "name on the hub such as owner/name; check the source's 'path'"
        )
    if is_local and glob.has_magic(path):
        raise UserError(
            f"{path}: `datasets` takes the folder's name for a pattern; rename the folder, or "
            f"name its files: {path}/*.parquet"
        )
    return _builder_files(path, subset, revision, streaming, is_local)


@contextmanager
def open_errors(path: str) -> Iterator[None]:
    """Turn any exception of the files, the network and the library into one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        advice = ""
        if not Path(path).is_dir() and not local_files(path):
            advice = f"; there is no file or folder {quote(path)} on this machine, and " + (
                "HF_HUB_OFFLINE is set: unset it to ask the hub"
                if datasets.config.HF_HUB_OFFLINE
                else "a name on the hub needs a network, and for closed data sets a login: or "
                "download its files and give their path"
            )
        cause = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        message = f"{path}: `datasets` cannot open it ({shorten(cause)}){advice}"
        raise cause_on_disk(path, error) or UserError(message) from error


def _builder_files(
    path: str, subset: str | None, revision: str | None, streaming: bool, is_local: bool
) -> DatasetFiles:
    """The files that `datasets` finds in a folder or in a repository of the hub."""
    if is_local:
        builder = _folder_builder(path, subset)
    else:
        builder = datasets.load_dataset_builder(path, name=subset, revision=revision)
    kind, config, splits = _builder_kind(builder), builder.config, _files_of(builder)
    files = [file for paths in splits.values() for file in paths]
    if is_local:
        _check_complete(path, files)
    endings = {row_files.ending_of(file) for file in files}
    is_text = kind in _TEXT_BUILDERS and endings <= set(row_files.ENDINGS)
    is_text = is_text and getattr(config, "field", None) is None
    has_metadata = any(Path(file).name == "metadata.csv" for file in files)
    if kind == "imagefolder" and is_local and (metadata := _metadata_files(splits)):
        return DatasetFiles("rows", metadata, image_folder=Path(path).resolve())
    if (kind == "csv" and not is_text) or (kind == "imagefolder" and has_metadata):
        raise UserError(
            f"{path}: `datasets` would take values of its CSV files such as NA and 007 for missing "
            "ones and numbers; unpack them on this machine and give their path"
        )
    if not splits or not (is_text or kind in arrow_tables.ENDINGS.values()):
        return DatasetFiles("other", splits, builder=builder)
    _check_options(path, config, is_local)
    if not is_local and not streaming:
        splits = DownloadManager().download(splits)
    separator = getattr(config, "sep", None) if kind == "csv" else None
    if separator == "," and endings == {"tsv"}:
        separator = None
    return DatasetFiles("rows" if is_text else kind, splits, separator)


def _check_complete(path: str, used: list[str]) -> None:
    """Refuse a folder of which `datasets` would leave out files, unless its README chooses them."""
    card = Path(path, datasets.config.REPOCARD_FILENAME)
    declared = DatasetCard.load(card).data.to_dict().get("configs") if card.is_file() else None
    if any("data_files" in config or "data_dir" in config for config in declared or ()):
        return
    found = {*map(os.path.realpath, used)}
    left_out = [
        str(file.relative_to(path))
        for file in files_below(Path(path))
        if row_files.ending_of(str(file)) in _ENDINGS
        and file.name not in _NO_DATA_NAMES
        and not _NO_DATA.fullmatch(file.name)
        and os.path.realpath(file) not in found
    ]
    if left_out:
        ending = "".join(Path(file).suffix for file in used[:1])
        raise UserError(
            f"{path}: `datasets` would leave out {list_names(left_out)} of this folder; move what "
            f"is not to be read elsewhere, name the files of one kind, such as {path}/*{ending}, "
            f"or declare `data_files` in its {card.name}"
        )


def _check_options(path: str, config: datasets.BuilderConfig, is_local: bool) -> None:
    """Refuse options of a README that would change what is read, and are not heeded here."""
    default = type(config)()
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    ignored = [
        name
        for name, value in options.items()
        if name not in _HEEDED
        and value != getattr(default, name)
        and not (name == "encoding" and str(value).lower().replace("_", "-") in _UTF_8)
    ]
    if ignored:
        remedy = "download and convert the files so that they can be read without"
        if is_local:
            card = Path(path, datasets.config.REPOCARD_FILENAME)
            remedy = f"convert the files, and remove these options from {card}"
        raise UserError(
            f"{path}: its README declares options that are not heeded: {list_names(ignored)}; "
            f"{remedy}"
        )


def _metadata_files(splits: dict[str, list[str]]) -> dict[str, list[str]]:
    """The metadata files of each split of an image folder; empty unless every split has some."""
    found = {
        split: [file for file in files if Path(file).name in row_files.METADATA_FILES]
        for split, files in splits.items()
    }
    return found if all(found.values()) else {}


def _with_images(row: row_files.FileRow, folder: Path) -> dict[str, Any]:
    """A row of metadata: `file_name` becomes `image`, a path relative to `folder`.

    As for `datasets`, `x_file_name` becomes `x`. Other columns may hold anything.
    """
    values = row.values()
    for key in [key for key in values if key.endswith(row_files.FILE_NAME)]:
        path = Path(row.path).parent / require_text(values, key)
        column = key.removesuffix(row_files.FILE_NAME).rstrip("_") or "image"
        values[column] = os.path.relpath(path, folder)
    return values


def _folder_builder(path: str, subset: str | None) -> Any:
    """The builder of a folder's files, without those that moma wrote."""
    outputs = outputs_below(Path(path).resolve())

    def is_own(file: str) -> bool:
        return not any(Path(file).is_relative_to(output) for output in outputs)

    try:
        builder = datasets.load_dataset_builder(path, name=subset)
        if all(is_own(file) for files in _files_of(builder).values() for file in files):
            return builder
    except Exception:  # Those that moma wrote may be the reason.
        if not outputs:
            raise
    splits = _default_splits(path, is_own)
    return datasets.load_dataset_builder(path, name=subset, data_files=splits)


def _default_splits(path: str, is_own: Callable[[str], bool]) -> dict[str, list[str]]:
    """The splits that `datasets` would find in a folder by the names of some of its files."""
    splits: dict[str, list[str]] = {}
    for patterns in ALL_DEFAULT_PATTERNS:
        for split, split_patterns in patterns.items():
            for pattern in split_patterns:
                try:
                    found = resolve_pattern(pattern, base_path=str(Path(path).resolve()))
                except FileNotFoundError:
                    continue
                own = dict.fromkeys(glob.escape(file) for file in found if is_own(file))
                splits[str(split)] = list(dict.fromkeys([*splits.get(str(split), ()), *own]))
        splits = {split: files for split, files in splits.items() if files}
        if splits:
            break
    return splits


def _files_of(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    return {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}


def _builder_kind(builder: datasets.DatasetBuilder) -> str:
    """The kind of files that a builder reads, by the module of its class or of a base class."""
    modules = [base.__module__ for base in type(builder).__mro__]
    found = [name for name in modules if name.startswith(_BUILDERS_PACKAGE)]
    return found[0].removeprefix(_BUILDERS_PACKAGE).partition(".")[0] if found else ""
