"""Rows of a data set: text files, Parquet and Arrow files, folders, and names on the hub.

Text files are read row by row. Other files are opened by the library `datasets`, images as they
are stored; a row that is not streamed is read again when its image is needed, so that none waits
in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from os.path import commonpath
from pathlib import Path
from typing import Any, Literal, Self

import datasets
from PIL import Image
from pydantic import Field, model_validator

from moma.data.documents import Document, ImageRef, Rejected, SourceName
from moma.data.sources.dataset_files import cannot_open, find_files, local_files, open_table
from moma.data.sources.interleaved import Part, content_name, make_segments, parse_parts
from moma.data.sources.jsonl import require_text
from moma.data.sources.paths import fingerprint_of, resolve_inside
from moma.data.sources.reading import CaptionReaderConfig, attempt, content_hash
from moma.data.sources.row_files import FileRow
from moma.errors import UserError, list_names, quote
from moma.images import read_image

_CHUNK_ROWS = 16
_TEXT_TYPES = ("string", "large_string", "null")


class DatasetConfig(CaptionReaderConfig):
    """Rows of a data set: local files, a folder of them, or a name on the hub.

    The values of text files are read as they are written: `NA` is a text, and `007` is not 7.

    A row is a text (no `image_column`), an image with its caption, two aligned lists of texts and
    images, or segments (`segments_column`), both as in `interleaved`. An image is bytes, or a
    `{bytes, path}` as `datasets` stores it, or a path relative to the files' common folder, which
    it does not leave. A document is named by a hash of its content; captions of the same image
    are held out together.

    Attributes:
        path: a file or pattern (`.parquet`, `.arrow`, `.jsonl`, `.ndjson`, `.json`, `.csv`,
            `.tsv`, `.txt`; text files also as `.gz`, `.bz2`, `.xz`, `.zst`), a folder that
            `datasets` can load, or a name on the hub such as `owner/name`.
        subset: the data set's configuration, where it has several.
        split: the split, or a part of it such as `train[:1000]`.
        revision: commit of the hub's repository; by default the newest.
        text_column: the column of texts or captions.
        image_column: the column of images; without it, rows are text.
        segments_column: the column of segments, instead of both.
        streaming: read rows as they arrive, without a copy on this machine's disk. Images then
            wait in memory, as they are stored, for as long as their documents are held.
    """

    kind: Literal["dataset"] = "dataset"
    name: SourceName = "dataset"
    path: str = Field(min_length=1)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    image_column: str | None = None
    segments_column: str | None = None
    streaming: bool = False

    @model_validator(mode="after")
    def _one_layout(self) -> Self:
        if self.segments_column is not None and self.image_column is not None:
            raise ValueError("give segments_column or image_column, not both")
        return self

    @property
    def _columns(self) -> list[str]:
        if self.segments_column is not None:
            return [self.segments_column]
        return [column for column in (self.text_column, self.image_column) if column is not None]

    def read_documents(self) -> Iterator[Document | Rejected]:
        """Yield a document for every row."""
        fingerprint, folder = self.fingerprint(), self._folder
        for number, row in enumerate(self._file_rows(fingerprint)):
            yield attempt(row.location, partial(self._document, row, number, fingerprint, folder))

    def fingerprint(self) -> str:
        """Return a fingerprint of the sizes and times of local files; of the hub, none.

        Give a `revision` for what may change on the hub.
        """
        files = local_files(self.path)
        if files:
            return fingerprint_of(files)
        folder = Path(self.path)
        return fingerprint_of(sorted(p for p in folder.rglob("*") if p.is_file()))

    @property
    def _folder(self) -> Path:
        """The folder that paths of images are relative to and do not leave."""
        files = local_files(self.path)
        if files:
            return Path(commonpath([file.absolute().parent for file in files]))
        path = Path(self.path)
        # Images of the hub lie in the library's own cache.
        return path if path.is_dir() else Path(datasets.config.HF_CACHE_HOME)

    def _file_rows(self, fingerprint: str) -> Iterator[FileRow]:
        """The rows with their columns, images undecoded."""
        files = find_files(self.path, self.subset, self.revision, self.streaming)
        try:
            if files.kind == "rows":
                yield from files.rows(self._columns, self.split)
                return
            opened, number = _open(self, fingerprint), 0
            for table in opened.iter(batch_size=_CHUNK_ROWS):
                for values in table.to_pylist():
                    number += 1
                    yield FileRow(f"{self.path}, row {number}", partial(dict, values))
        except UserError:
            raise
        except Exception as error:  # whatever the files, the network and the library raise
            raise cannot_open(self.path, error) from error

    def _document(self, file_row: FileRow, number: int, fingerprint: str, folder: Path) -> Document:
        values = file_row.values()
        for column in self._columns:
            if column not in values:
                raise UserError(f"has no {quote(column)}; the keys are: {list_names(values)}")
        row = _Row(values, number, fingerprint, folder, file_row.location)
        if self.segments_column is None and self.image_column is None:
            text = require_text(row.values, self.text_column)
            return Document(content_hash(text), (text,), row=row.location)
        parts = self._parts(row.values)
        stored = [(kind, self._stored(v) if kind == "image" else v) for kind, v in parts]
        segments = make_segments(stored, partial(self._image_of, row))
        name = content_name(stored)
        if not self._is_captioned(row.values):
            return Document(name, segments, row=row.location)
        caption, image = segments
        assert isinstance(caption, str) and isinstance(image, ImageRef)
        return Document(
            name,
            self.with_caption(name, caption, image),
            row=row.location,
            held_out_with=content_name([part for part in stored if part[0] == "image"]),
        )

    def _is_captioned(self, values: dict[str, Any]) -> bool:
        return self.image_column is not None and not isinstance(values[self.image_column], list)

    def _parts(self, values: dict[str, Any]) -> list[Part]:
        if self.image_column is None:
            return parse_parts({"segments": values[self.segments_column or ""]})
        image = values[self.image_column]
        if isinstance(image, list):
            return parse_parts({"texts": values[self.text_column], "images": image})
        if image is None:
            raise UserError(f"has no image under {quote(self.image_column)}")
        return [("text", require_text(values, self.text_column)), ("image", image)]

    def _stored(self, value: Any) -> bytes | str:
        """An image as its bytes or the path of its file."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, (bytes, str)) or not value:
            raise UserError("an image is neither bytes nor a path; check the names of the columns")
        return value

    def _image_of(self, row: "_Row", which: int, stored: bytes | str) -> ImageRef:
        name = f"{row.location}, image {which}"
        if isinstance(stored, str):
            return self.image_ref(resolve_inside(row.folder, stored), name)
        if self.streaming:
            read = partial(read_image, stored, name, max_pixels=self.max_pixels)
        else:
            read = partial(_read_cell, self, row.fingerprint, row.number, which - 1, name)
        return ImageRef(name, read)


@dataclass(frozen=True)
class _Row:
    """A row of a data set, and what is needed to read it again.

    Attributes:
        values: its columns.
        number: row number, from 0.
        fingerprint: of the data set.
        folder: the folder that paths of images are relative to.
        location: file and row, for messages.
    """

    values: dict[str, Any]
    number: int
    fingerprint: str
    folder: Path
    location: str


def _read_cell(
    config: DatasetConfig, fingerprint: str, row: int, which: int, location: str
) -> Image.Image:
    """Read an image of a row; the row is read again instead of kept in memory."""
    (values,) = _open(config, fingerprint)[row : row + 1].to_pylist()
    images = [value for kind, value in config._parts(values) if kind == "image"]
    stored = config._stored(images[which])
    assert isinstance(stored, bytes)
    return read_image(stored, location, max_pixels=config.max_pixels)


@lru_cache(maxsize=8)
def _open(config: DatasetConfig, fingerprint: str) -> Any:
    """The columns that are used, as Arrow tables; files that changed are opened again."""
    columns = config._columns
    opened = open_table(
        config.path, config.subset, config.revision, columns, config.split, config.streaming
    )
    if config.segments_column is None:
        _check_text_column(config, opened.features or {})
    return opened


def _check_text_column(config: DatasetConfig, features: dict[str, Any]) -> None:
    """Refuse a column of numbers or the like as texts at once, instead of row by row."""
    feature = features.get(config.text_column)
    feature = getattr(feature, "feature", feature)  # of a list
    if isinstance(feature, datasets.Value) and feature.dtype not in _TEXT_TYPES:
        raise UserError(
            f"{config.path}: the column {quote(config.text_column)} holds {feature.dtype} values, "
            "not text; set text_column to a column of texts"
        )
