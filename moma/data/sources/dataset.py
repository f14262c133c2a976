"""Parquet, JSON Lines, Arrow and CSV files, and data sets of the Hugging Face hub.

All of them are opened by the library `datasets`. Images stay as they are stored; rows that are
not streamed are read again when an image is needed, so that none waits in memory. JSON Lines are
opened as lines and parsed here, so that one broken row does not stop the others.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from os.path import commonpath
from pathlib import Path
from typing import Any, Literal, Self

import datasets
from PIL import Image
from pydantic import Field, model_validator

from moma.data.documents import Document, ImageRef, Rejected, SourceName
from moma.data.sources.interleaved import Part, content_name, make_segments, parse_parts
from moma.data.sources.jsonl import parse_json_object, require_text
from moma.data.sources.paths import expand_pattern, fingerprint_of, resolve_inside
from moma.data.sources.reading import CaptionReaderConfig, attempt, content_hash
from moma.errors import UserError
from moma.images import read_image

_BUILDERS = {
    "parquet": "parquet",
    "jsonl": "text",
    "json": "json",
    "arrow": "arrow",
    "csv": "csv",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CHUNK_ROWS = 16
_TEXTS = ("string", "large_string", "null")
# The column of lines, and an encoding that keeps every byte of them.
_LINE, _BYTES = "text", "latin-1"


class DatasetConfig(CaptionReaderConfig):
    """Rows of a data set: local files, a folder of them, or a name on the hub.

    A row is a text (no `image_column`), an image with its caption, two aligned lists of texts and
    images, or segments (`segments_column`), both as in `interleaved`. An image is bytes, or a
    `{bytes, path}` as `datasets` stores it, or a path relative to the files' common folder, which
    it does not leave. A document is named by a digest of its content; captions of the same image
    are held out together.

    Attributes:
        path: a file or pattern (`.parquet`, `.jsonl`, `.json`, `.arrow`, `.csv`), a folder that
            `datasets` can load, or a name on the hub such as `owner/name`.
        subset: the data set's configuration, where it has several.
        split: the split, or a part of it such as `train[:1000]`.
        revision: commit of the hub's repository; without it, what is newest.
        text_column: the column of texts or captions.
        image_column: the column of images; left out, rows are text.
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
        for number, values in enumerate(self._values(fingerprint)):
            if self._by_line and not values[_LINE].strip():
                continue
            row = _Row(values, number, fingerprint, folder, f"{self.path}, row {number + 1}")
            yield attempt(row.place, partial(self._document, row))

    def fingerprint(self) -> str:
        """Changes when the size or time of a local file does; of the hub, it tells nothing.

        Give a `revision` for what may change there.
        """
        files = self._files()
        if files:
            return fingerprint_of(files)
        folder = Path(self.path)
        return fingerprint_of(sorted(p for p in folder.rglob("*") if p.is_file()))

    def _files(self) -> list[Path]:
        """The local files; none for a folder or a name on the hub."""
        return expand_pattern(Path(self.path)) if self._ending in _BUILDERS else []

    @property
    def _ending(self) -> str:
        """The path's ending in lower case, without that of a compression."""
        return re.sub(r"\.(gz|zst|xz|bz2)$", "", self.path.lower()).rpartition(".")[2]

    @property
    def _by_line(self) -> bool:
        """Whether rows are lines of JSON."""
        return self._ending == "jsonl"

    @property
    def _folder(self) -> Path:
        """What relative paths of images are relative to, and do not leave."""
        files = self._files()
        if files:
            return Path(commonpath([file.absolute().parent for file in files]))
        path = Path(self.path)
        # Images of the hub lie in the library's own cache.
        return path if path.is_dir() else Path(datasets.config.HF_CACHE_HOME)

    def _values(self, fingerprint: str) -> Iterator[dict[str, Any]]:
        """The rows' columns, images undecoded."""
        opened = _open(self, fingerprint)
        try:
            for table in opened.iter(batch_size=_CHUNK_ROWS):
                yield from table.to_pylist()
        except Exception as error:  # whatever the file, the network and the library raise
            raise UserError(f"{self.path}: cannot read it ({error})") from error

    def _parsed(self, line: str) -> dict[str, Any]:
        """The columns of a line of JSON."""
        values = parse_json_object(line.encode(_BYTES))
        missing = [column for column in self._columns if column not in values]
        if missing:
            raise UserError(f"has no '{missing[0]}'; the keys there are: {', '.join(values)}")
        return values

    def _document(self, row: "_Row") -> Document:
        if self._by_line:
            row = replace(row, values=self._parsed(row.values[_LINE]))
        if self.segments_column is None and self.image_column is None:
            text = require_text(row.values, self.text_column)
            return Document(content_hash(text), (text,), row=row.place)
        parts = self._parts(row.values)
        stored = [(kind, self._stored(v) if kind == "image" else v) for kind, v in parts]
        segments = make_segments(stored, partial(self._image_of, row))
        name = content_name(stored)
        if not self._is_captioned(row.values):
            return Document(name, segments, row=row.place)
        caption, image = segments
        assert isinstance(caption, str) and isinstance(image, ImageRef)
        return Document(
            name,
            self.with_caption(name, caption, image),
            row=row.place,
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
            raise UserError(f"has no image under '{self.image_column}'")
        return [("text", require_text(values, self.text_column)), ("image", image)]

    def _stored(self, value: Any) -> bytes | str:
        """An image as its bytes, or the name of its file."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not isinstance(value, (bytes, str)) or not value:
            raise UserError("an image is neither bytes nor a path; see the columns' names")
        return value

    def _image_of(self, row: "_Row", which: int, stored: bytes | str) -> ImageRef:
        name = f"{row.place}, image {which}"
        if isinstance(stored, str):
            return self.image_ref(resolve_inside(row.folder, stored), name)
        if self.streaming:
            read = partial(read_image, stored, name, max_pixels=self.max_pixels)
        else:
            read = partial(_read_cell, self, row.fingerprint, row.number, which - 1, name)
        return ImageRef(name, read)


@dataclass(frozen=True)
class _Row:
    """A row of a data set, with what it takes to find it again.

    Attributes:
        values: its columns.
        number: its number, from 0.
        fingerprint: of the data set.
        folder: what paths of images are relative to.
        place: for messages.
    """

    values: dict[str, Any]
    number: int
    fingerprint: str
    folder: Path
    place: str


def _read_cell(
    config: DatasetConfig, fingerprint: str, row: int, which: int, place: str
) -> Image.Image:
    """Read an image of a row; the row is read again, so as not to be kept."""
    (values,) = _open(config, fingerprint)[row : row + 1].to_pylist()
    images = [value for kind, value in config._parts(values) if kind == "image"]
    stored = config._stored(images[which])
    assert isinstance(stored, bytes)
    return read_image(stored, place, max_pixels=config.max_pixels)


@lru_cache(maxsize=8)
def _open(config: DatasetConfig, fingerprint: str) -> Any:
    """The columns that are read, as Arrow tables; `fingerprint` reopens files that changed."""
    columns = [_LINE] if config._by_line else config._columns
    try:
        opened = _load(config)
        found = opened.column_names or columns
    except UserError:
        raise
    except Exception as error:  # whatever the file, the network and the library raise
        cause = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise UserError(
            f"{config.path}: `datasets` cannot open it ({cause}){_advice(config)}"
        ) from error
    missing = [column for column in columns if column not in found]
    if missing:
        raise UserError(
            f"{config.path}: has no column '{missing[0]}'; the columns are: {', '.join(found)}"
        )
    if not config._by_line and config.segments_column is None:
        _check_texts(config, opened.features or {})
    # Arrow's own values: `datasets` would decode images, wherever their paths lead.
    return opened.select_columns(columns).with_format("arrow")


def _check_texts(config: DatasetConfig, features: dict[str, Any]) -> None:
    """Refuse a column of numbers or the like as texts at once, instead of row by row."""
    feature = features.get(config.text_column)
    feature = getattr(feature, "feature", feature)  # of a list
    if isinstance(feature, datasets.Value) and feature.dtype not in _TEXTS:
        others = [
            name
            for name, one in features.items()
            if isinstance(one, datasets.Value) and one.dtype in _TEXTS
        ]
        raise UserError(
            f"{config.path}: the column '{config.text_column}' holds {feature.dtype}, no texts; "
            f"set text_column to a column of texts: {', '.join(others) or 'there is none'}"
        )


def _is_on_hub(config: DatasetConfig) -> bool:
    return not config._files() and not Path(config.path).is_dir()


def _advice(config: DatasetConfig) -> str:
    """What to do where a name on the hub cannot be opened."""
    if not _is_on_hub(config):
        return ""
    if datasets.config.HF_HUB_OFFLINE:
        return "; HF_HUB_OFFLINE is set: unset it to let it ask the hub"
    return (
        "; a name on the hub needs a network, and for closed data sets a login: "
        "or fetch its files and give their path"
    )


def _load(config: DatasetConfig) -> Any:
    files = [str(file) for file in config._files()]
    if _is_on_hub(config) and not _HUB_NAME.fullmatch(config.path):
        raise UserError(
            f"{config.path}: is no file that ends in {', '.join(_BUILDERS)}, no folder, and no "
            "name on the hub such as owner/name; check the source's 'path'"
        )
    where: dict[str, Any] = {"path": config.path, "name": config.subset}
    if files:
        where = {"path": _BUILDERS[config._ending], "data_files": files}
    if config._by_line:
        where["encoding"] = _BYTES
    datasets.disable_progress_bars()  # `prepare` shows its own
    # What it logs about a file that it cannot read, it raises as well.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets.load_dataset(
        **where, split=config.split, revision=config.revision, streaming=config.streaming
    )
