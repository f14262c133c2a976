"""Rows of a data set: text files, Parquet and Arrow files, folders, and names on the hub.

Text files are read row by row. Other files are opened by the library `datasets`, images as they
are stored; unless it is streamed, a row is read again when its image is needed.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count
from os.path import commonpath
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import datasets
from pydantic import AfterValidator, Field, model_validator

from moma.data.documents import Document, ImageRef, SourceName, SourcePart
from moma.data.sources import arrow_tables
from moma.data.sources.dataset_files import find_files, local_files, open_errors
from moma.data.sources.interleaved import (
    Part,
    align_lists,
    content_name,
    make_document,
    parse_segments,
)
from moma.data.sources.jsonl import require_text
from moma.data.sources.parts import IMAGE_BYTES, cut_files, ranges_of
from moma.data.sources.paths import files_below, fingerprint_of, resolve_inside
from moma.data.sources.reading import CaptionReaderConfig, Row, content_hash
from moma.data.sources.row_files import FileRow, check_columns, row_cuts
from moma.errors import UserError, list_names, quote
from moma.recipe_paths import refuse_address

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
        streaming: read rows as they arrive, without a copy on this machine's disk. The documents
            then hold their images in memory, as they are stored.
    """

    kind: Literal["dataset"] = "dataset"
    name: SourceName = "dataset"
    path: Annotated[str, AfterValidator(refuse_address)] = Field(min_length=1)
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
    def columns(self) -> list[str]:
        """The columns that are used."""
        if self.segments_column is not None:
            return [self.segments_column]
        return [column for column in (self.text_column, self.image_column) if column is not None]

    def parts(self, part_bytes: int) -> list[SourcePart]:
        """Cut files of lines between rows, and other data into ranges of rows; no stream."""
        with open_errors(self.path):
            files = find_files(self.path, self.subset, self.revision, self.streaming)
            local = files.local(self.split)
            if files.kind == "rows" and local:
                has_images = self.image_column is not None or self.segments_column is not None
                row_bytes = IMAGE_BYTES if has_images else 0
                cuts_of = partial(row_cuts, part_bytes=part_bytes, row_bytes=row_bytes)
                return cut_files(local, part_bytes, cuts_of)
            if files.kind == "parquet" and local:
                self._check_text(arrow_tables.parquet_features([*map(str, local)], self.columns))
                return cut_files(local, part_bytes, arrow_tables.row_group_cuts(self.columns))
            if files.kind == "rows" or self.streaming:
                return [SourcePart()]
            table = _open(self, self.fingerprint())
            rows, size = len(table), table.data.nbytes
            step = max(_CHUNK_ROWS, rows * part_bytes // max(size, 1))
            return [
                SourcePart(
                    stop=1, begin=row, end=min(row + step, rows), size=size * step // max(rows, 1)
                )
                for row in range(0, rows, step)
            ]

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield the rows of a part."""
        fingerprint, files, folder = self.fingerprint(), local_files(self.path), Path(self.path)
        # Paths of images are relative to this folder and do not lead out of it.
        if files:
            folder = Path(commonpath([file.absolute().parent for file in files]))
        elif not folder.is_dir():  # on the hub: the library copies its images into its cache
            folder = Path(datasets.config.HF_CACHE_HOME)
        for number, row in self._file_rows(fingerprint, part):
            yield row.location, partial(self._document, row, number, fingerprint, folder)

    def fingerprint(self) -> str:
        """Return a fingerprint of local files; of the hub none, where a `revision` is fixed."""
        files = local_files(self.path)
        if not files and Path(self.path).is_dir():
            files = files_below(Path(self.path))
        return fingerprint_of(files)

    def _file_rows(
        self, fingerprint: str, part: SourcePart
    ) -> Iterator[tuple[int | None, FileRow]]:
        """The rows of a part, images undecoded, and their numbers if they can be read again."""
        with open_errors(self.path):
            files = find_files(self.path, self.subset, self.revision, self.streaming)
            if files.kind == "rows":
                yield from ((None, row) for row in files.rows(self.columns, self.split, part))
                return
            local = files.local(self.split)
            if files.kind == "parquet" and local and part.stop is not None:
                groups = ranges_of(local, part)
                direct = arrow_tables.read_row_groups(groups, self.columns, _CHUNK_ROWS)
                for path, number, table in direct:
                    for values in table.to_pylist():
                        number += 1
                        location = f"{path}, row {number}"
                        yield None, FileRow(str(path), location, partial(dict, values))
                return
            opened = _open(self, fingerprint)
            if part.end is not None:
                opened = opened.select(range(part.begin, part.end))
            if local and files.kind in arrow_tables.ENDINGS.values():
                locations = arrow_tables.row_locations(files.kind, local, part.begin)
            else:
                locations = (f"{self.path}, row {number}" for number in count(part.begin + 1))
            number = part.begin
            for table in opened.iter(batch_size=_CHUNK_ROWS):
                for values in table.to_pylist():
                    row = FileRow(self.path, next(locations), partial(dict, values))
                    yield None if self.streaming else number, row
                    number += 1

    def _check_text(self, features: datasets.Features) -> None:
        """Refuse a column of numbers or the like at once, instead of row by row."""
        feature = features.get(self.text_column)
        feature = getattr(feature, "feature", feature)  # of a list
        if isinstance(feature, datasets.Value) and feature.dtype not in _TEXT_TYPES:
            raise UserError(
                f"{self.path}: the column {quote(self.text_column)} holds {feature.dtype} values, "
                "not text; set text_column to a column of texts"
            )

    def _document(
        self, row: FileRow, number: int | None, fingerprint: str, folder: Path
    ) -> Document:
        values = row.values()
        for column in self.columns:
            if column not in values:
                raise UserError(f"has no {quote(column)}; the keys are: {list_names(values)}")
        if self.segments_column is None and self.image_column is None:
            text = require_text(values, self.text_column)
            return Document(content_hash(text), (text,))

        def image_of(which: int, stored: bytes | str) -> ImageRef:
            name = f"{row.location}, image {which}"
            if isinstance(stored, str):
                return self.image_ref(resolve_inside(folder, stored), name)
            if number is None:
                return self.stored_image(partial(bytes, stored), name)
            return self.stored_image(partial(_read_cell, self, fingerprint, number, which), name)

        parts: list[Part] = [
            (kind, _stored(value) if kind == "image" else value)
            for kind, value in self.parts_of(values)
        ]
        document = make_document(parts, image_of)
        if self.image_column is None or isinstance(values[self.image_column], list):
            return document
        caption, image = document.segments
        assert isinstance(caption, str) and isinstance(image, ImageRef)
        return replace(
            document,
            segments=self.with_caption(document.name, caption, image),
            held_out_with=content_name([part for part in parts if part[0] == "image"]),
        )

    def parts_of(self, values: dict[str, Any]) -> list[Part]:
        """Return the texts and the images of a row, images as the row holds them.

        Raises:
            UserError: there are none, or they are malformed.
        """
        if self.image_column is None:
            return parse_segments(values, self.segments_column or "")
        image = values[self.image_column]
        if isinstance(image, list):
            return align_lists(values, self.text_column, self.image_column)
        if image is None:
            raise UserError(f"has no image under {quote(self.image_column)}; remove the row")
        return [("text", require_text(values, self.text_column)), ("image", image)]


def _stored(value: Any) -> bytes | str:
    """An image as its bytes or the path of its file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (bytes, str)) or not value:
        raise UserError("an image is neither bytes nor a path; check the names of the columns")
    return value


def _read_cell(config: DatasetConfig, fingerprint: str, row: int, which: int) -> bytes:
    """An image of a row, which is read again instead of kept in memory."""
    with open_errors(config.path):
        (values,) = _open(config, fingerprint)[row : row + 1].to_pylist()
    images = [_stored(value) for kind, value in config.parts_of(values) if kind == "image"]
    stored = images[which - 1]
    assert isinstance(stored, bytes)
    return stored


@lru_cache(maxsize=8)
def _open(config: DatasetConfig, fingerprint: str) -> Any:
    """The columns that are used, as Arrow tables; files that changed are opened again."""
    columns = config.columns
    files = find_files(config.path, config.subset, config.revision, config.streaming)
    opened = files.table(columns, config.split, config.streaming)
    check_columns(config.path, opened.column_names or columns, columns)
    # Arrow's own values: `datasets` would decode images, wherever their paths lead.
    opened = opened.select_columns(columns).with_format("arrow")
    config._check_text(opened.features or {})
    return opened
