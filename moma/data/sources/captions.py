"""A folder of images whose captions are listed in a JSON Lines or CSV file."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from moma.data.documents import Document, SourceName, SourcePart
from moma.data.sources.jsonl import require_text
from moma.data.sources.listings import listed_once
from moma.data.sources.parts import IMAGE_BYTES, cut_files, ranges_of
from moma.data.sources.paths import FileRange, files_below, fingerprint_of, resolve_inside
from moma.data.sources.reading import CaptionReaderConfig, Row
from moma.data.sources.row_files import (
    FILE_NAME,
    METADATA_FILES,
    FileRow,
    named_images,
    read_rows,
    row_cuts,
)
from moma.errors import UserError
from moma.recipe import RequiredPath

_LIST = "captions.jsonl"


class CaptionsConfig(CaptionReaderConfig):
    """A folder of images whose captions are listed in `captions.jsonl` or `metadata.jsonl`.

    A row is an object such as `{"image": "cats/1.jpg", "caption": "Two cats."}`; as in the image
    folders of the library `datasets`, the keys may also be `file_name` and `text`. The image's
    path is relative to the folder of the list and stays inside it. Without a `captions.jsonl`,
    every `metadata.jsonl` and `metadata.csv` in the folder and below it is read. A document is
    named by the path of its image in the folder, however the row spells it, so that several
    captions of one image are held out together.

    Attributes:
        path: the folder.
    """

    kind: Literal["captions"] = "captions"
    name: SourceName = "captions"
    path: RequiredPath

    def parts(self, part_bytes: int) -> list[SourcePart]:
        """Cut the lists between rows, other than CSV."""
        cuts_of = partial(row_cuts, part_bytes=part_bytes, row_bytes=IMAGE_BYTES)
        return cut_files(_lists(self.path), part_bytes, cuts_of)

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield the rows of the lists."""
        rows = _read(ranges_of(_lists(self.path), part))
        return ((row.location, partial(self._document, row)) for row in rows)

    def fingerprint(self) -> str:
        """Return what changes with the lists, or with the size or time of an image in them."""
        lists = _lists(self.path)
        return fingerprint_of(lists, named_images(_read(map(FileRange, lists)), _image_files))

    def _document(self, row: FileRow) -> Document:
        values = row.values()
        image = require_text(values, *_image_keys(row))
        caption = require_text(values, "caption", "text")
        path = resolve_inside(Path(row.path).parent, image)
        name = path.relative_to(self.path.resolve()).as_posix()
        return Document(name, self.with_caption(name, caption, self.image_ref(path, row.location)))


@listed_once
def _lists(folder: Path) -> list[Path]:
    captions = folder / _LIST
    if captions.exists():
        return [captions]
    lists = [path for path in files_below(folder) if path.name in METADATA_FILES]
    if not lists:
        raise UserError(
            f"{captions}: cannot read it (no such file, and no {' or '.join(METADATA_FILES)}); "
            "check the source's 'path'"
        )
    return lists


def _read(lists: Iterable[FileRange]) -> Iterator[FileRow]:
    for rows in lists:
        yield from read_rows(str(rows.path), [FILE_NAME], lines=rows)


def _image_keys(row: FileRow) -> tuple[str, str]:
    return ("image", FILE_NAME) if Path(row.path).name == _LIST else (FILE_NAME, "image")


def _image_files(row: FileRow) -> Iterator[Path]:
    yield Path(row.path).parent / require_text(row.values(), *_image_keys(row))
