"""WebDataset: tar files in which the files of one sample follow each other and share a name.

    shards/*.tar → members → samples → documents

Nothing is unpacked to disk. Of a plain tar, only the offset of an image is kept until the image is
read; a compressed one can only be read from its beginning, so its images are kept in memory as they
are stored. `webdataset` groups the members; they are read here, since its own reader loads members
of any size, skips links silently and takes a damaged header for the end of the archive.
"""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from PIL import Image
from pydantic import Field

from moma.data.documents import Document, ImageRef, Rejected, SourceName
from moma.data.sources.jsonl import parse_json_object, require_text
from moma.data.sources.paths import expand_pattern, fingerprint_of
from moma.data.sources.reading import CaptionReaderConfig, attempt, check_text
from moma.errors import UserError, list_names, shorten
from moma.images import read_image
from moma.recipe import RequiredPath

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_MAX_NAME_CHARACTERS = 4096
# Samples without image or caption that wait until it is known whether they belong to another one.
_MAX_WAITING = 1000

_DECOMPRESS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_TAR_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class _Member:
    """A file of an archive.

    Attributes:
        archive: the tar file.
        name: path in the archive.
        offset: offset of its content in the tar; None if the tar is compressed.
        size: size of its content in bytes.
        data: the content, where it had to be read at once.
        problem: why it cannot be used; empty if it can.
    """

    archive: Path
    name: str
    offset: int | None
    size: int
    data: bytes | None
    problem: str

    def check(self) -> None:
        """Raise `UserError` if the member cannot be used."""
        if self.problem:
            raise UserError(f"{shorten(self.name)} {self.problem}")

    def content(self) -> bytes:
        """Return the content.

        Raises:
            UserError: the member cannot be used or read.
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


@dataclass
class _Sample:
    """Members whose names differ only after the last dot.

    Attributes:
        name: path up to that dot.
        members: by what follows the dot, in lower case.
        repeated: names of members that the archive has more than once.
    """

    name: str
    members: dict[str, _Member]
    repeated: list[str]

    @property
    def image(self) -> _Member | None:
        return next((self.members[one] for one in _IMAGES if one in self.members), None)

    @property
    def text(self) -> _Member | None:
        return next((self.members[one] for one in _TEXTS if one in self.members), None)

    @property
    def is_complete(self) -> bool:
        return self.image is not None and self.text is not None

    def add(self, other: "_Sample") -> None:
        """Add the members of another sample of the same name."""
        twice = self.members.keys() & other.members.keys()
        self.repeated += [*(self.members[one].name for one in sorted(twice)), *other.repeated]
        self.members |= other.members


class WebDatasetConfig(CaptionReaderConfig):
    """Tar files of images (`.jpg`, `.jpeg`, `.png`, `.webp`) with captions (`.txt`, `.json`).

    The image and the caption of a sample have the same name up to the last dot and follow each
    other. A document is named by that name. Where a sample has both, the `.txt` is its caption.
    Other files of a complete sample are not read: `1.cls` or `1.mask.png` beside `1.jpg`, `1.txt`.

    Attributes:
        path: the tar file, or a pattern such as `shards/*.tar`.
        caption_key: key of the caption in a `.json`.
        max_member_bytes: maximum size of an image or caption as stored; a larger one is rejected
            unread.
    """

    kind: Literal["webdataset"] = "webdataset"
    name: SourceName = "webdataset"
    path: RequiredPath
    caption_key: str = "caption"
    max_member_bytes: int = Field(default=64 * 2**20, ge=1)

    def read_documents(self) -> Iterator[Document | Rejected]:
        """Yield a document for every sample, in the order of the archives."""
        for path in expand_pattern(self.path):
            for _, samples in groupby(self._samples(path), key=_webdataset_name):
                yield from self._documents(path, samples)

    def fingerprint(self) -> str:
        """Return what changes with the size or the time of a tar file."""
        return fingerprint_of(expand_pattern(self.path))

    def _documents(self, path: Path, samples: Iterator[_Sample]) -> Iterator[Document | Rejected]:
        """The documents of samples whose names share the part up to the first dot.

        For WebDataset that part is the name of one sample: here too, if it has an image and a
        caption without further dots. Of names such as `clip.0001.jpg` and `clip.0001.txt`, each
        pair is a document.
        """
        main: _Sample | None = None
        waiting: list[Document | Rejected] = []
        for sample in samples:
            if sample.name != _webdataset_name(sample):
                row = self._document_or_reason(path, sample)
                if sample.is_complete:
                    yield row
                else:
                    waiting.append(row)
            elif main is None:
                main = sample
            else:
                main.add(sample)
            if len(waiting) > _MAX_WAITING:  # no sample has so many further files
                yield from waiting
                waiting = []
        if main is None or not main.is_complete:
            yield from waiting
        if main is not None:
            yield self._document_or_reason(path, main)

    def _document_or_reason(self, path: Path, sample: _Sample) -> Document | Rejected:
        location = f"{path}, {sample.name}"
        return attempt(location, partial(self._document, sample, shorten(location)))

    def _document(self, sample: _Sample, location: str) -> Document:
        name = check_text(sample.name, "of its name")
        if len(name) > _MAX_NAME_CHARACTERS:
            raise UserError(f"its name has {len(name)} characters; shorten it")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError("its path leads out of the archive; remove it")
        if sample.repeated:
            repeated = list_names(sample.repeated)
            raise UserError(f"{repeated} is in the archive twice; give each sample its own name")
        image, text = sample.image, sample.text
        if image is None or text is None:
            raise UserError(
                f"needs an image ({', '.join(_IMAGES)}) and a caption ({', '.join(_TEXTS)}); "
                f"the sample has: {list_names(sorted(sample.members))}"
            )
        image.check()
        caption = self._caption(text)
        name_of_image = f"{location}{PurePosixPath(image.name).suffix}"
        read = partial(_read_member, image, name_of_image, self.max_pixels)
        segments = self.with_caption(name, caption, ImageRef(name_of_image, read))
        return Document(name, segments, row=location)

    def _caption(self, member: _Member) -> str:
        if member.name.lower().endswith(".json"):
            return require_text(parse_json_object(member.content()), self.caption_key)
        try:
            text = member.content().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"the caption is not UTF-8 ({error})") from error
        return require_text({"caption": text}, "caption")

    def _samples(self, path: Path) -> Iterator[_Sample]:
        from webdataset.tariterators import group_by_keys  # imports torch

        repeated: list[str] = []

        def note_repeated(error: Exception) -> bool:
            repeated.append(str(error.args[0]).partition(":")[0])
            return True

        members = ({"fname": m.name, "data": m, "__url__": str(path)} for m in self._members(path))
        for sample in group_by_keys(members, keys=_split_name, handler=note_repeated):
            found = {key: value for key, value in sample.items() if isinstance(value, _Member)}
            yield _Sample(sample["__key__"], found, repeated)
            repeated = []

    def _members(self, path: Path) -> Iterator[_Member]:
        """The files of an archive, in its order."""
        try:
            with _open_tar(path) as (opened, compressed):
                stream = _BoundedStream(opened, self.max_member_bytes)
                # Not "r|", which reads ahead of the bound.
                with tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[call-overload]
                    while (info := archive.next()) is not None:
                        # Otherwise the archive keeps a record of every member.
                        archive.members = []  # type: ignore[attr-defined]
                        if not info.isdir():
                            yield self._member(path, archive, info, compressed)
                # tarfile takes any block that is not a header for the end.
                if stream.last.strip(b"\0"):
                    raise tarfile.ReadError("damaged in its middle")
        except _TAR_ERRORS as error:
            raise UserError(
                f"{path}: cannot read it ({shorten(str(error))}); "
                "download it again or exclude it from 'path'"
            ) from error

    def _member(
        self, path: Path, archive: tarfile.TarFile, info: tarfile.TarInfo, compressed: bool
    ) -> _Member:
        problem = ""
        if not info.isreg() or info.issparse():
            problem = "is a link or another special file; pack the file itself"
        elif info.size > self.max_member_bytes:
            problem = (
                f"has {info.size} bytes, more than max_member_bytes = {self.max_member_bytes}; "
                "shrink it or raise 'max_member_bytes'"
            )
        data = None
        if compressed and not problem and _split_name(info.name)[1].lower() in (*_IMAGES, *_TEXTS):
            opened = archive.extractfile(info)
            data = opened.read() if opened is not None else b""
        offset = None if compressed else info.offset_data
        return _Member(path, info.name.removeprefix("./"), offset, info.size, data, problem)


def _split_name(path: str) -> tuple[str, str]:
    """A path up to the last dot of the file's name, and what follows the dot."""
    while path.startswith("./"):
        path = path[2:]
    folder, slash, name = path.rpartition("/")
    start, dot, ending = name.rpartition(".")
    return (f"{folder}{slash}{start}", ending) if dot else (path, "")


def _webdataset_name(sample: _Sample) -> str:
    """What WebDataset takes for a sample's name: the path up to the first dot of the file's."""
    folder, slash, name = sample.name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


class _BoundedStream:
    """A file with a limit for each read: headers of a tar may ask for any number of bytes.

    Attributes:
        last: the result of the last read.
    """

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file, self._max_bytes = file, max(max_bytes, tarfile.RECORDSIZE)
        self.tell, self.seek = file.tell, file.seek
        self.last = b""

    def read(self, size: int) -> bytes:
        if size > self._max_bytes:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._file.read(size)
        return self.last


@contextmanager
def _open_tar(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """A tar file's content, and whether it is compressed."""
    with path.open("rb") as file:
        start = file.read(max(map(len, _DECOMPRESS)))
    decompress = next((d for magic, d in _DECOMPRESS.items() if start.startswith(magic)), None)
    with decompress(path) if decompress else path.open("rb") as file:
        yield file, decompress is not None


def _read_member(member: _Member, location: str, max_pixels: int) -> Image.Image:
    return read_image(member.content(), location, max_pixels=max_pixels)
