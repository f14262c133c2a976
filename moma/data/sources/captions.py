"""A folder of pictures with a caption each, listed in its `captions.jsonl`."""

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
    inside,
    lines,
    stamp_of,
    text_of,
)
from moma.errors import UserError


class CaptionsConfig(CaptionReaderConfig):
    """A folder of pictures with a caption each, listed in its `captions.jsonl`.

    A row of the list is an object such as `{"image": "cats/1.jpg", "caption": "Two cats."}`; the
    picture's path is relative to the folder and stays inside it. A document is named by where its
    picture lies in the folder, however the row spells it: several captions of one picture are held
    out together or not at all.

    Attributes:
        path: the folder.
    """

    kind: Literal["captions"] = "captions"
    name: SourceName = "captions"
    path: Path

    @property
    def _list(self) -> Path:
        return self.path / "captions.jsonl"

    def _rows(self) -> Iterator[Document | Rejected]:
        for line in filled(lines(self._list)):
            yield attempt(line.place, partial(self._document, line))

    def stamp(self) -> str:
        """Changes when the list does, or the size or time of a picture in it."""
        return stamp_of([self._list], self._pictures())

    def _document(self, line: Line) -> Document:
        values = line.values()
        image, caption = (text_of(values, key) for key in ("image", "caption"))
        path = inside(self.path, image)
        name = path.relative_to(self.path.resolve()).as_posix()
        segments = self._ordered(name, caption, self._picture(path, line.place))
        return Document(name=name, segments=segments, row=line.place)

    def _pictures(self) -> Iterator[Path]:
        for line in filled(lines(self._list)):
            try:
                yield self.path / text_of(line.values(), "image")
            except UserError:
                continue  # the list's own stamp tells when that changes
