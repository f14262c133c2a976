"""WebDataset: tar files in which the files of one sample follow one another under one key.

    shards/*.tar → members, one after another → samples → documents

Nothing is ever unpacked to disk. Of a plain tar only the place of an image is kept until it is
read; a compressed one can only be read from its beginning, so its images wait as they are
stored, in memory.
"""

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from PIL import Image
from pydantic import Field

from moma.data.documents import Document, ImageRef, Rejected, SourceName
from moma.data.sources.reading import (
    CaptionReaderConfig,
    attempt,
    checked_text,
    fingerprint_of,
    matching,
    parse_object,
    text_of,
)
from moma.errors import UserError
from moma.images import read_image
from moma.recipe import RequiredPath

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")


_DECOMPRESS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}


@dataclass(frozen=True)
class Member:
    """A file of an archive.

    Attributes:
        archive: the tar file.
        key: of its sample: the path up to the first dot of the file's name.
        ending: what follows that dot, in lower case.
        offset: where its content begins in the tar; None if that is compressed.
        size: of its content, in bytes.
        data: the content, where it had to be read at once.
        problem: why it cannot be used; empty if it can.
    """

    archive: Path
    key: str
    ending: str
    offset: int | None
    size: int
    data: bytes | None
    problem: str = ""

    def check(self) -> None:
        """Whether it can be used.

        Raises:
            UserError: it cannot.
        """
        if self.problem:
            raise UserError(f"{self.key}.{self.ending} {self.problem}")

    def content(self) -> bytes:
        """What it holds.

        Raises:
            UserError: it cannot be used or read.
        """
        self.check()
        if self.data is not None:
            return self.data
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset or 0)
                return file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.archive}: cannot read it ({error.strerror})") from error


class WebDatasetConfig(CaptionReaderConfig):
    """Tar files of images (`.jpg`, `.jpeg`, `.png`, `.webp`) with captions (`.txt`, `.json`).

    A document is named by the key of its sample. Where a sample has both, the `.txt` is its
    caption. Files with other endings are not read.

    Attributes:
        path: the tar file, or a pattern such as `shards/*.tar`.
        caption_key: where the caption stands in a `.json`.
        max_member_bytes: largest image or caption, as stored; a larger one is rejected unread.
    """

    kind: Literal["webdataset"] = "webdataset"
    name: SourceName = "webdataset"
    path: RequiredPath
    caption_key: str = "caption"
    max_member_bytes: int = Field(default=64 * 2**20, ge=1)

    def _rows(self) -> Iterator[Document | Rejected]:
        for path in matching(self.path):
            for key, members in groupby(self._members(path), key=lambda member: member.key):
                place = f"{path}, {key}"
                yield attempt(place, partial(self._document, key, _sample(members), place))

    def fingerprint(self) -> str:
        """Changes when the size or the time of a tar file does."""
        return fingerprint_of(matching(self.path))

    def _document(self, key: str, sample: dict[str, Member], place: str) -> Document:
        checked_text(key, "of its key")
        if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            raise UserError("its path leads out of the archive; remove it")
        image = next((sample[ending] for ending in IMAGES if ending in sample), None)
        text = next((sample[ending] for ending in TEXTS if ending in sample), None)
        if image is None or text is None:
            found = ", ".join(sorted(sample))
            raise UserError(
                f"needs an image ({', '.join(IMAGES)}) and a caption ({', '.join(TEXTS)}); "
                f"there is: {found}"
            )
        image.check()
        caption = self._caption(text)
        read = partial(_read_member, image, place, self.max_pixels)
        segments = self._ordered(key, caption, ImageRef(f"{place}.{image.ending}", read))
        return Document(name=key, segments=segments, row=place)

    def _caption(self, member: Member) -> str:
        if member.ending == "json":
            return text_of(parse_object(member.content()), self.caption_key)
        try:
            text = member.content().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"the caption is not UTF-8 ({error})") from error
        return text_of({"caption": text}, "caption")

    def _members(self, path: Path) -> Iterator[Member]:
        """The files of an archive, in its order."""
        try:
            with _opened(path) as (opened, compressed):
                stream = _Bounded(opened, self.max_member_bytes)
                # Not "r|": it would read ahead of the bound.
                with tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[call-overload]
                    while (info := archive.next()) is not None:
                        # Or the archive would keep a record of every member.
                        archive.members = []  # type: ignore[attr-defined]
                        if not info.isdir():
                            yield self._member(path, archive, info, compressed)
                # tarfile takes any block that is no header for the end.
                if stream.last.strip(b"\0"):
                    raise tarfile.ReadError("damaged in its middle")
        except (
            OSError,
            EOFError,
            ValueError,
            tarfile.TarError,
            zlib.error,
            lzma.LZMAError,
        ) as error:
            raise UserError(
                f"{path}: cannot read it ({error}); fetch it again or take it out of 'path'"
            ) from error

    def _member(
        self, path: Path, archive: tarfile.TarFile, info: tarfile.TarInfo, compressed: bool
    ) -> Member:
        key, ending = _key_and_ending(info.name)
        problem = ""
        if not info.isreg() or info.issparse():
            problem = "is no plain file but a link or the like; pack the file itself"
        elif info.size > self.max_member_bytes:
            problem = (
                f"has {info.size} bytes, more than max_member_bytes = {self.max_member_bytes}; "
                "shrink it or raise 'max_member_bytes'"
            )
        data = None
        if compressed and not problem and ending in (*IMAGES, *TEXTS):
            opened = archive.extractfile(info)
            data = opened.read() if opened is not None else b""
        offset = None if compressed else info.offset_data
        return Member(path, key, ending, offset, info.size, data, problem)


def _sample(members: Iterable[Member]) -> dict[str, Member]:
    """The files of one key by their endings."""
    sample: dict[str, Member] = {}
    for member in members:
        if member.ending in sample:
            member = replace(member, problem="stands there twice; give each its own key", data=None)
        sample[member.ending] = member
    return sample


def _key_and_ending(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return re.sub(r"^(\./)+", "", f"{folder}{slash}{key}"), ending.lower()


class _Bounded:
    """A file whose reads are bounded: the headers of a tar may ask for any number of bytes.

    Attributes:
        last: what the last read gave.
    """

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, most
        self.tell, self.seek = file.tell, file.seek
        self.last = b""

    def read(self, size: int) -> bytes:
        if size > max(self._most, tarfile.RECORDSIZE):
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._file.read(size)
        return self.last


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """A tar file's content, and whether it is compressed."""
    with path.open("rb") as file:
        start = file.read(max(map(len, _DECOMPRESS)))
    decompress = next((d for magic, d in _DECOMPRESS.items() if start.startswith(magic)), None)
    with decompress(path) if decompress else path.open("rb") as file:
        yield file, decompress is not None


def _read_member(member: Member, place: str, max_pixels: int) -> Image.Image:
    return read_image(member.content(), f"{place}.{member.ending}", max_pixels=max_pixels)
