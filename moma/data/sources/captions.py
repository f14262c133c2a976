"""A folder of images with a caption each, listed in its `captions.jsonl`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from moma.data.documents import Document, Rejected, SourceName
from moma.data.sources.reading import (
    CaptionReaderConfig,
    Line,
    attempt,
    filled,
    fingerprint_of,
    inside,
    lines,
    text_of,
)
from moma.errors import UserError
from moma.recipe import RequiredPath


class CaptionsConfig(CaptionReaderConfig):
    """A folder of images with a caption each, listed in its `captions.jsonl`.

    A row of the list is an object such as `{"image": "cats/1.jpg", "caption": "Two cats."}`; the
    image's path is relative to the folder and stays inside it. A document is named by where its
    image lies in the folder, however the row spells it: several captions of one image are held
    out together or not at all.

    Attributes:
        path: the folder.
    """

    kind: Literal["captions"] = "captions"
    name: SourceName = "captions"
    path: RequiredPath

    @property
    def _list(self) -> Path:
        return self.path / "captions.jsonl"

    def _rows(self) -> Iterator[Document | Rejected]:
        for line in filled(lines(self._list)):
            yield attempt(line.place, partial(self._document, line))

    def fingerprint(self) -> str:
        """Changes when the list does, or the size or time of an image in it."""
        return fingerprint_of([self._list], self._images())

    def _document(self, line: Line) -> Document:
        values = line.values()
        image, caption = (text_of(values, key) for key in ("image", "caption"))
        path = inside(self.path, image)
        name = path.relative_to(self.path.resolve()).as_posix()
        segments = self._ordered(name, caption, self._image(path, line.place))
        return Document(name=name, segments=segments, row=line.place)

    def _images(self) -> Iterator[Path]:
        for line in filled(lines(self._list)):
            try:
                yield self.path / text_of(line.values(), "image")
            except UserError:
                continue  # the list's own fingerprint tells when that changes
