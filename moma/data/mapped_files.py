"""The Arrow files of shards, memory-mapped; not more than some of them at a time."""

import errno
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from moma.errors import UserError, error_reason

# Key of the Arrow schema's metadata with the origin of a file.
METADATA_KEY = b"moma"
# Mapped files of the shards of a data folder; Linux allows 65,530 mappings in a process.
MAX_OPEN_FILES = 1024
# What reading an Arrow file with other content, or with other columns, raises.
DAMAGE = (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError)


GetFile = Callable[[Path], "MappedFile"]


def cached_files(maximum: int = MAX_OPEN_FILES) -> GetFile:
    """Return a function that maps a file, and keeps the most recently used ones mapped.

    Any number of threads may call it; an array of a closed file stays valid while it is used.
    """
    return lru_cache(maximum)(MappedFile)


class MappedFile:
    """The documents in one Arrow file, memory-mapped.

    Attributes:
        origin: what the file's metadata has of its origin.
    """

    def __init__(self, path: Path, locked: BinaryIO | None = None) -> None:
        """Map a file.

        Args:
            locked: the same file, which is closed when this object is no longer used.
        """
        self._locked = locked
        with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
            table = stream.read_all()
        self.origin: dict[str, Any] = json.loads(table.schema.metadata[METADATA_KEY])
        self._images, self._names = table.column("images"), table.column("name")
        # Views of the mapped file: a document is a slice and needs no copy.
        chunks = table.column("ids").chunks
        self._flat = [chunk.values.to_numpy() for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._first_row = [*accumulate(map(len, chunks), initial=0)]

    @property
    def images(self) -> np.ndarray:
        """Number of images of each document, int32 of shape [documents]."""
        return self._images.to_numpy()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 of shape [documents]."""
        return np.concatenate([np.empty(0, np.int32), *map(np.diff, self._offsets)])

    def ids(self, row: int) -> np.ndarray:
        """Return the ids of a document; see `EncodedSplit.ids`."""
        chunk = bisect_right(self._first_row, row) - 1
        index = row - self._first_row[chunk]
        begin, end = self._offsets[chunk][index : index + 2]
        return self._flat[chunk][begin:end]

    def name(self, row: int) -> str:
        """Return the name of a document."""
        return str(self._names[row])


@dataclass(frozen=True)
class Index:
    """What is known of documents without reading them.

    Attributes:
        documents: number of documents of each file.
        images, lengths, origins: as in `EncodedSplit`.
    """

    documents: Sequence[int]
    images: np.ndarray
    lengths: np.ndarray
    origins: list[dict[str, Any]]


def read_index(paths: Sequence[Path], get_file: GetFile) -> Index:
    """Read the index of some files, one after another."""
    images, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    origins: list[dict[str, Any]] = []
    for file in map(get_file, paths):
        origins.append(file.origin)
        images.append(file.images)
        lengths.append(file.lengths)
    return Index([*map(len, images[1:])], np.concatenate(images), np.concatenate(lengths), origins)


class EncodedSplit:
    """The encoded documents of one split, over any number of memory-mapped files.

    Attributes:
        images, lengths: number of images and of tokens of each document, int32 of shape
            [documents].
        origins: the origin in each file's metadata.
    """

    def __init__(
        self, paths: Sequence[Path], get_file: GetFile, index: Index | None = None
    ) -> None:
        """Open the files one after another with `get_file`, or none with an index."""
        self._paths, self._get_file = paths, get_file
        index = index or read_index(paths, get_file)
        self._first_row = [*accumulate(index.documents, initial=0)]
        self.images, self.lengths, self.origins = index.images, index.lengths, index.origins

    def __len__(self) -> int:
        return self._first_row[-1]

    def ids(self, row: int) -> np.ndarray:
        """Return the ids of a document, unsigned integers of shape [tokens]; a read-only view."""
        file, row = self._find(row)
        return file.ids(row)

    def name(self, row: int) -> str:
        """Return the name of a document."""
        file, row = self._find(row)
        return file.name(row)

    def _find(self, row: int) -> tuple[MappedFile, int]:
        number = bisect_right(self._first_row, row) - 1
        path = self._paths[number]
        try:
            return self._get_file(path), row - self._first_row[number]
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise  # of a disk that fails or is full
            raise UserError(
                f"{path}: missing or damaged ({error_reason(error)}); run `moma prepare --verify`, "
                "which makes it again"
            ) from error
