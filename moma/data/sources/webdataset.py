"""WebDataset: tar files in which the files of one sample follow each other and share a name.

    shards/*.tar → members → samples → documents

Nothing is unpacked to disk. Images of a plain tar are read at their offset when they are needed; a
compressed one can only be read from its beginning, so its images are held in memory as stored.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from pydantic import Field

from moma.data.documents import Document, SourceName, SourcePart
from moma.data.sources.jsonl import decode, decompress, parse_json_object, require_text
from moma.data.sources.parts import cut_files, ranges_of, whole_file
from moma.data.sources.paths import expand_pattern, fingerprint_of, read_errors
from moma.data.sources.reading import CaptionReaderConfig, Row, check_text
from moma.errors import UserError, list_names, shorten
from moma.files import open_regular
from moma.recipe import RequiredPath

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_MAX_NAME_CHARACTERS = 4096
# Incomplete samples that are held until it is known whether they belong to another one.
_MAX_INCOMPLETE = 1000
_REMEDY = "download it again or exclude it from 'path'"


@dataclass(frozen=True)
class _Member:
    """A file of an archive: its path, what reads it, and, if it cannot be used, why."""

    name: str
    read: Callable[[], bytes]
    problem: str

    def check(self) -> None:
        """Raise `UserError` if the file cannot be used."""
        if self.problem:
            raise UserError(f"{shorten(self.name)} {self.problem}")


@dataclass
class _Sample:
    """Members, by ending in lower case, whose names differ only after the last dot.

    Names that the archive has more than once are `repeated`.
    """

    name: str
    members: dict[str, _Member]
    repeated: list[str]

    @property
    def group(self) -> str:
        """What WebDataset takes for a sample's name: the path up to the first dot of the file's."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    def first_of(self, endings: tuple[str, ...]) -> _Member | None:
        """Return the member with the first of several endings that the sample has."""
        return next((self.members[key] for key in endings if key in self.members), None)

    @property
    def is_complete(self) -> bool:
        """Whether it has an image and a caption."""
        return self.first_of(_IMAGES) is not None and self.first_of(_TEXTS) is not None

    def add(self, other: "_Sample") -> None:
        """Add the members of another sample of the same name."""
        twice = self.members.keys() & other.members.keys()
        self.repeated += [*(self.members[key].name for key in sorted(twice)), *other.repeated]
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

    def parts(self, part_bytes: int) -> list[SourcePart]:
        """Cut the source between archives."""
        return cut_files(expand_pattern(self.path), part_bytes, whole_file)

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield the samples in the order of the archives."""
        for path, *_ in ranges_of(expand_pattern(self.path), part):
            for name, samples in groupby(self._samples(path), key=lambda sample: sample.group):
                for sample in _merge(name, samples):
                    location = shorten(f"{path}, {sample.name}")
                    yield location, partial(self._document, sample, location)

    def fingerprint(self) -> str:
        """Return what changes with the size or the time of a tar file."""
        return fingerprint_of(expand_pattern(self.path))

    def _document(self, sample: _Sample, location: str) -> Document:
        name = check_text(sample.name, "of its name")
        if len(name) > _MAX_NAME_CHARACTERS:
            raise UserError(f"its name has {len(name)} characters; shorten it")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError("its path leads out of the archive; remove it")
        if sample.repeated:
            repeated = list_names(sample.repeated)
            raise UserError(f"{repeated} is in the archive twice; give each sample its own name")
        image, text = sample.first_of(_IMAGES), sample.first_of(_TEXTS)
        if image is None or text is None:
            raise UserError(
                f"needs an image ({', '.join(_IMAGES)}) and a caption ({', '.join(_TEXTS)}); "
                f"the sample has: {list_names(sorted(sample.members))}"
            )
        image.check()
        text.check()
        if text.name.lower().endswith(".json"):
            caption = require_text(parse_json_object(text.read()), self.caption_key)
        else:
            caption = require_text({"caption": decode(text.read()).strip()}, "caption")
        location += PurePosixPath(image.name).suffix
        segments = self.with_caption(name, caption, self.stored_image(image.read, location))
        return Document(name, segments)

    def _samples(self, path: Path) -> Iterator[_Sample]:
        # Of `webdataset`, only the grouping is used: its reader of tar files loads members of any
        # size, skips links silently and takes a damaged header for the end of the archive.
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
        with read_errors(path, _REMEDY, tarfile.TarError, ValueError), open_regular(path) as file:
            stream = _BoundedStream(opened := decompress(file), self.max_member_bytes)
            # Not "r|", which reads ahead of the bound.
            with tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[call-overload]
                while (info := archive.next()) is not None:
                    # Otherwise the archive keeps a record of every member.
                    archive.members = []  # type: ignore[attr-defined]
                    if not info.isdir():
                        yield self._member(path, info, None if opened is file else archive)
            _check_end(stream)

    def _member(
        self, path: Path, info: tarfile.TarInfo, compressed: tarfile.TarFile | None
    ) -> _Member:
        problem = ""
        read: Callable[[], bytes] = partial(_read_range, path, info.offset_data, info.size)
        if not info.isreg() or info.issparse():
            problem = "is a link or another special file; pack the file itself"
        elif info.size > self.max_member_bytes:
            problem = (
                f"has {info.size} bytes, more than max_member_bytes = {self.max_member_bytes}; "
                "shrink it or raise 'max_member_bytes'"
            )
        elif compressed and _split_name(info.name)[1].lower() in (*_IMAGES, *_TEXTS):
            content = compressed.extractfile(info)
            read = partial(bytes, content.read() if content is not None else b"")
        return _Member(info.name.removeprefix("./"), read, problem)


def _merge(name: str, samples: Iterator[_Sample]) -> Iterator[_Sample]:
    """Yield the samples that share a `name` up to the first dot, which to WebDataset are one.

    Here, too, incomplete samples are further files of `name` if that has an image and a caption.
    But every pair such as `clip.0001.jpg` and `clip.0001.txt` is a sample of its own.
    """
    main: _Sample | None = None
    incomplete: list[_Sample] = []
    for sample in samples:
        if sample.name == name:
            if main is None:
                main = sample
            else:
                main.add(sample)
        elif sample.is_complete:
            yield sample
        else:  # its content is not needed
            members = {key: replace(file, read=bytes) for key, file in sample.members.items()}
            incomplete.append(replace(sample, members=members))
        if len(incomplete) > _MAX_INCOMPLETE:
            yield from incomplete
            incomplete = []
    if main is None or not main.is_complete:
        yield from incomplete
    if main is not None:
        yield main


def _split_name(path: str) -> tuple[str, str]:
    """A path up to the last dot of the file's name, and what follows the dot."""
    while path.startswith("./"):
        path = path[2:]
    folder, slash, name = path.rpartition("/")
    start, dot, ending = name.rpartition(".")
    return (f"{folder}{slash}{start}", ending) if dot else (path, "")


class _BoundedStream:
    """A file that keeps the `last` read and limits each: tar headers may ask for any size."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file, self._max_bytes = file, max(max_bytes, tarfile.RECORDSIZE)
        self.tell, self.seek = file.tell, file.seek
        self.last = b""

    def read(self, size: int) -> bytes:
        if size > self._max_bytes:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self._file.read(size)
        return self.last


def _check_end(stream: _BoundedStream) -> None:
    """Raise `ReadError` unless an archive ended with zeros; `tarfile` ends at any odd block."""
    if not stream.last:
        raise tarfile.ReadError("it is cut off")
    if stream.last.strip(b"\0"):
        raise tarfile.ReadError("damaged in its middle")
    if stream.tell() <= tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it holds no files: delete it if it is meant to be empty")
    while block := stream.read(tarfile.RECORDSIZE):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                "data follow its end: it is damaged, or consists of several archives, which "
                "`tar --ignore-zeros` unpacks"
            )


def _read_range(path: Path, offset: int, size: int) -> bytes:
    with read_errors(path, _REMEDY), open_regular(path) as file:
        file.seek(offset)
        return file.read(size)
