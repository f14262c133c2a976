"""A folder of images whose captions are listed in a JSON Lines file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from moma.data.documents import Document, Rejected, SourceName
from moma.data.sources.jsonl import Line, jsonl_fingerprint, read_jsonl, require_text
from moma.data.sources.paths import files_below, resolve_inside
from moma.data.sources.reading import CaptionReaderConfig
from moma.errors import UserError
from moma.recipe import RequiredPath

_LIST = "captions.jsonl"
# The name, and the key of the image, that image folders of the library `datasets` have.
_METADATA, _FILE_NAME = "metadata.jsonl", "file_name"


class CaptionsConfig(CaptionReaderConfig):
    """A folder of images whose captions are listed in `captions.jsonl` or `metadata.jsonl`.

    A row is an object such as `{"image": "cats/1.jpg", "caption": "Two cats."}`; as in the image
    folders of the library `datasets`, the keys may also be `file_name` and `text`. The image's
    path is relative to the folder of the list and stays inside it. Without a `captions.jsonl`,
    every `metadata.jsonl` in the folder and below it is read. A document is named by the path of
    its image in the folder, however the row spells it, so that several captions of one image are
    held out together.

    Attributes:
        path: the folder.
    """

    kind: Literal["captions"] = "captions"
    name: SourceName = "captions"
    path: RequiredPath

    def read_documents(self) -> Iterator[Document | Rejected]:
        """Yield a document for every row of the lists."""
        return read_jsonl(self._lists(), self._document)

    def fingerprint(self) -> str:
        """Return what changes with the lists, or with the size or time of an image in them."""
        return jsonl_fingerprint(self._lists(), self._image_files)

    def _lists(self) -> list[Path]:
        captions = self.path / _LIST
        if captions.exists():
            return [captions]
        files = files_below(self.path) if self.path.is_dir() else []
        lists = [path for path in files if path.name == _METADATA]
        if not lists:
            raise UserError(
                f"{captions}: cannot read it (no such file, and no {_METADATA}); "
                "check the source's 'path'"
            )
        return lists

    def _document(self, line: Line) -> Document:
        values = line.values()
        image = require_text(values, *_image_keys(line))
        caption = require_text(values, "caption", "text")
        path = resolve_inside(line.path.parent, image)
        name = path.relative_to(self.path.resolve()).as_posix()
        segments = self.with_caption(name, caption, self.image_ref(path, line.location))
        return Document(name=name, segments=segments, row=line.location)

    def _image_files(self, line: Line) -> Iterator[Path]:
        yield line.path.parent / require_text(line.values(), *_image_keys(line))


def _image_keys(line: Line) -> tuple[str, str]:
    return (_FILE_NAME, "image") if line.path.name == _METADATA else ("image", _FILE_NAME)
