"""A folder of images, each with a text file beside it: `cat.png` and `cat.txt`."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from moma.data.documents import Document, Rejected, SourceName
from moma.data.sources.reading import (
    MAX_ROW_BYTES,
    CaptionReaderConfig,
    attempt,
    checked_text,
    files_below,
    fingerprint_of,
    inside,
)
from moma.errors import UserError
from moma.images import SUFFIXES
from moma.recipe import RequiredPath


class FolderConfig(CaptionReaderConfig):
    """A folder of images, each with a text file beside it: `cat.png` and `cat.txt`.

    Folders below it are read too, hidden ones are not. A document is named by the text file's path
    without its ending. Of several images with one text, PNG and JPEG go before other formats.

    Attributes:
        path: the folder.
        caption: the text file's `first_line`, or the `whole` of it.
        without_text: what becomes of an image without a text file: it is rejected (`reject`), or
            it does not count (`leave_out`).
    """

    kind: Literal["folder"] = "folder"
    name: SourceName = "folder"
    path: RequiredPath
    caption: Literal["first_line", "whole"] = "first_line"
    without_text: Literal["reject", "leave_out"] = "reject"

    def _rows(self) -> Iterator[Document | Rejected]:
        for stem, (images, text) in sorted(self._groups().items()):
            if text is not None:
                yield attempt(str(text), partial(self._document, stem, images, text))
            elif self.without_text == "reject":
                for image in images:
                    expected = image.with_suffix(".txt").name
                    yield Rejected(
                        str(image),
                        f"there is no {expected} beside it; add it, remove the image, or leave "
                        'such images out with without_text = "leave_out"',
                    )

    def fingerprint(self) -> str:
        """Changes when images or texts come or go, or their size or time does."""
        files = [(*images, text) for images, text in self._groups().values()]
        return fingerprint_of(file for group in files for file in sorted(filter(None, group)))

    def _groups(self) -> dict[str, tuple[list[Path], Path | None]]:
        """Images, best format first, and the text of each path without its ending."""
        groups: dict[str, tuple[list[Path], Path | None]] = {}
        for path in files_below(self.path):
            stem = path.relative_to(self.path).with_suffix("").as_posix()
            images, text = groups.get(stem, ([], None))
            if path.suffix.lower() in SUFFIXES:
                images.append(path)
                images.sort(key=lambda image: SUFFIXES.index(image.suffix.lower()))
            elif path.suffix.lower() == ".txt":
                text = path
            else:
                continue
            groups[stem] = (images, text)
        return groups

    def _document(self, stem: str, images: list[Path], text: Path) -> Document:
        checked_text(stem, "of its name")
        if not images:
            raise UserError("there is no image beside it; add one or remove the text")
        caption = self._caption(text)
        path = inside(self.path, str(images[0].relative_to(self.path)))
        segments = self._ordered(stem, caption, self._image(path, str(text), "remove both files"))
        return Document(name=stem, segments=segments, row=str(text))

    def _caption(self, file: Path) -> str:
        inside(self.path, str(file.relative_to(self.path)))
        try:
            with file.open("rb") as opened:
                first_line = self.caption == "first_line"
                data = (opened.readline if first_line else opened.read)(MAX_ROW_BYTES + 1)
            text = data.decode("utf-8-sig").strip()
        except OSError as error:
            raise UserError(f"cannot read it ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 ({error}); convert the file") from error
        if not text or len(data) > MAX_ROW_BYTES:
            raise UserError("its caption is empty or endless; write one or remove both files")
        return checked_text(text, "of the file")
