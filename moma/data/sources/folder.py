"""A folder of images, each with a text file of the same name: `cat.png` and `cat.txt`."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

from moma.data.documents import Document, SourceName, SourcePart
from moma.data.sources.jsonl import decode
from moma.data.sources.listings import listed_once
from moma.data.sources.parts import Cut, cut_files, ranges_of, whole_file
from moma.data.sources.paths import files_below, fingerprint_of, read_errors, resolve_inside
from moma.data.sources.reading import MAX_ROW_BYTES, CaptionReaderConfig, Row, check_text
from moma.errors import UserError
from moma.files import open_regular
from moma.images import SUFFIXES
from moma.recipe import RequiredPath

_Groups = dict[str, tuple[list[Path], list[Path]]]


class FolderConfig(CaptionReaderConfig):
    """A folder of images, each with a text file of the same name: `cat.png` and `cat.txt`.

    Folders below it are read too, hidden ones and links to folders are not. A document is named by
    the text file's path without its suffix. Of several images with one text, the first in the
    order of `moma.images.SUFFIXES` is taken: PNG and JPEG before other formats.

    Attributes:
        path: the folder.
        caption: the text file's `first_line`, or the `whole` of it.
        without_text: what happens to an image without a text file: it is rejected (`reject`) or
            left out (`leave_out`).
    """

    kind: Literal["folder"] = "folder"
    name: SourceName = "folder"
    path: RequiredPath
    caption: Literal["first_line", "whole"] = "first_line"
    without_text: Literal["reject", "leave_out"] = "reject"

    def parts(self, part_bytes: int) -> list[SourcePart]:
        """Cut the folder between texts, in the order of their names."""
        stems, groups = _sorted_groups(self.path)

        def cuts_of(stem: Path) -> Iterator[Cut]:
            files = chain(*groups[str(stem)])
            sizes = [cut.size for file in files for cut in whole_file(file)]
            yield Cut(0, 0, sum(sizes))

        return cut_files(stems, part_bytes, cuts_of)

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield a row for every text file, and for every image without one."""
        stems, groups = _sorted_groups(self.path)
        for chosen in ranges_of(stems, part):
            stem = str(chosen.path)
            images, texts = groups[stem]
            if texts:
                yield str(texts[0]), partial(self._document, stem, images, texts)
            elif self.without_text == "reject":
                for image in images:
                    yield str(image), partial(_without_text, image)

    def fingerprint(self) -> str:
        """Return what changes with the names, sizes and times of images and texts."""
        groups = _groups(self.path).values()
        return fingerprint_of(file for group in groups for file in sorted([*group[0], *group[1]]))

    def _document(self, stem: str, images: list[Path], texts: list[Path]) -> Document:
        check_text(stem, "of its name")
        text = texts[0]
        if len(texts) > 1:
            raise UserError(f"there are two texts of this name, also {texts[1].name}; remove one")
        if not images:
            raise UserError("there is no image beside it; add one or remove the text")
        caption = self._caption(text)
        path = resolve_inside(self.path, str(images[0].relative_to(self.path)))
        image = self.image_ref(path, str(text), "remove both files")
        return Document(stem, self.with_caption(stem, caption, image))

    def _caption(self, file: Path) -> str:
        resolve_inside(self.path, str(file.relative_to(self.path)))
        with read_errors(file, "remove both files"), open_regular(file) as opened:
            first_line = self.caption == "first_line"
            data = (opened.readline if first_line else opened.read)(MAX_ROW_BYTES + 1)
        if len(data) > MAX_ROW_BYTES:
            raise UserError(f"longer than {MAX_ROW_BYTES >> 20} MiB; shorten it")
        text = decode(data).strip()
        if not text:
            raise UserError("its caption is empty; write one or remove both files")
        return text


@listed_once
def _sorted_groups(folder: Path) -> tuple[list[Path], _Groups]:
    """The paths without suffix in their order, and `_groups`."""
    groups = _groups(folder)
    if not groups:
        raise UserError(f"{folder}: holds no images and texts; check the source's 'path'")
    return [*map(Path, sorted(groups))], groups


def _groups(folder: Path) -> _Groups:
    """Images, best format first, and texts of each path without its suffix."""
    groups: _Groups = {}
    for path in files_below(folder):
        suffix = path.suffix.lower()
        if suffix in (*SUFFIXES, ".txt"):
            stem = path.relative_to(folder).with_suffix("").as_posix()
            images, texts = groups.setdefault(stem, ([], []))
            (texts if suffix == ".txt" else images).append(path)
    for images, _ in groups.values():
        images.sort(key=lambda image: SUFFIXES.index(image.suffix.lower()))
    return groups


def _without_text(image: Path) -> Document:
    raise UserError(
        f"there is no {image.with_suffix('.txt').name} beside it; add it, remove the image, or "
        'leave such images out with without_text = "leave_out"'
    )
