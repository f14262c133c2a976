"""The Arrow files of shards, memory-mapped; not more than some of them at a time."""

import json
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

# Key of the Arrow schema's metadata with the origin of a file.
METADATA_KEY = b"moma"
# Mapped files of the shards of a data folder; Linux allows 65,530 mappings in a process.
MAX_OPEN_FILES = 1024


class OpenFiles:
    """Memory-mapped Arrow files, of which the least recently used are closed.

    Any number of threads may read; an array of a closed file stays valid while it is used.
    """

    def __init__(self, maximum: int = MAX_OPEN_FILES) -> None:
        self.get: Callable[[Path], MappedFile] = lru_cache(maximum)(MappedFile)


class MappedFile:
    """The documents in one Arrow file, memory-mapped.

    Attributes:
        origin: what the file's metadata has of its origin.
    """

    def __init__(self, path: Path) -> None:
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
        """Return the ids of a document; see `Shard.ids`."""
        chunk = bisect_right(self._first_row, row) - 1
        index = row - self._first_row[chunk]
        begin, end = self._offsets[chunk][index : index + 2]
        return self._flat[chunk][begin:end]

    def name(self, row: int) -> str:
        """Return the name of a document."""
        return str(self._names[row])
