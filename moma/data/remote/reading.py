"""Shards whose Arrow files are at an address: opened through the cache when they are read."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Literal
from weakref import WeakValueDictionary

import numpy as np

from moma.data.mapped_files import MappedFile
from moma.data.outputs import CACHE_FOLDER
from moma.data.remote.address import Address
from moma.data.remote.cache import Cache
from moma.data.remote.manifest import Manifest, Name, index_name, object_name
from moma.data.remote.storage import open_storage
from moma.errors import StorageError, UserError, error_reason
from moma.files import Checksum, read_bounded
from moma.recipe import Config

LINK_FILE = "remote.json"
# The files that a process keeps open have at most this part of the cache, or are a single one.
_OPEN_SHARE = 1 / 16
# Each has a file descriptor.
_MAX_OPEN_FILES = 128
logger = logging.getLogger(__name__)


class Link(Config):
    """Where the Arrow files of a folder of shards are; stored in it as `remote.json`.

    Attributes:
        address: as `data.remote`.
        folder: folder of the objects below the address.
        cache_bytes: as `data.cache_bytes`.
        manifest: of the complete shards at the address that the folder is of; None before they are
            complete.
    """

    address: Address
    folder: Name
    cache_bytes: int
    manifest: Manifest | None = None

    def is_intact(self, file: str, expected: Checksum) -> bool:
        """Return whether the object of a file exists and has this size and checksum."""
        name = object_name(self.folder, file, expected)
        return open_storage(self.address).is_intact(name, expected)


def read_link(folder: Path) -> Link | None:
    """Return where the Arrow files of a folder of shards are; None if they are in the folder.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / LINK_FILE
    try:
        return Link.model_validate_json(read_bounded(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: damaged; delete the folder, which is fetched again from data.remote"
        ) from error


def cache_of(data: Path, cache_bytes: int) -> Cache:
    """Return the cache of a data folder."""
    return Cache(data / CACHE_FOLDER, cache_bytes)


class _OpenCachedFiles:
    """The files that this process has open of a cache; the least recently used are closed."""

    def __init__(self, cache: Cache, cache_bytes: int) -> None:
        self.cache, self._max_bytes = cache, cache_bytes * _OPEN_SHARE
        self._files: OrderedDict[Checksum, MappedFile] = OrderedDict()
        self._lock = Lock()

    def find(self, expected: Checksum) -> MappedFile | None:
        """Return the file of this content if it is open."""
        with self._lock:
            if expected in self._files:
                self._files.move_to_end(expected)
            return self._files.get(expected)

    def add(self, expected: Checksum, file: MappedFile) -> MappedFile:
        """Keep a file open, and return it."""
        with self._lock:
            self._files[expected] = file
            while len(self._files) > 1 and (
                len(self._files) > _MAX_OPEN_FILES
                or sum(size for size, _ in self._files) > self._max_bytes
            ):
                self._files.popitem(last=False)
        return file

    def close_half(self) -> bool:
        """Close the half of the files that was used least recently; False if none is open."""
        with self._lock:
            number = (len(self._files) + 1) // 2
            for _ in range(number):
                self._files.popitem(last=False)
        return number > 0


OpenFiles = WeakValueDictionary[tuple[Path, int], _OpenCachedFiles]
"""The open files of caches, by data folder and size of its cache."""

# Of this process: the sources and the splits share them.
_OPEN_FILES: OpenFiles = WeakValueDictionary()


class RemoteFiles:
    """The Arrow files of a folder of shards, those that are not there through the cache."""

    def __init__(
        self,
        folder: Path,
        link: Link,
        checksums: Mapping[str, Checksum],
        pauses: Sequence[int] = (2, 10, 30),
        open_files: OpenFiles = _OPEN_FILES,
    ) -> None:
        """Open nothing yet.

        Args:
            pauses: seconds before a download that failed is tried again, each time.
            open_files: those of this process.

        Raises:
            UserError: a file is larger than the cache.
        """
        sizes = [size for name, (size, _) in checksums.items() if name.endswith(".arrow")]
        largest = max(sizes, default=0)
        if largest > link.cache_bytes:
            raise UserError(
                f"{folder}: files of {largest:,} bytes do not fit into data.cache_bytes = "
                f"{link.cache_bytes:,}; increase it"
            )
        self._link, self._checksums, self._pauses = link, checksums, pauses
        key = folder.parent.parent, link.cache_bytes
        self._files = open_files.setdefault(key, _OpenCachedFiles(cache_of(*key), link.cache_bytes))

    def get(self, path: Path) -> MappedFile:
        """Return a file, which is opened if it is not open."""
        expected = self._checksums[path.name]
        return self._files.find(expected) or self._files.add(expected, self._open(path, expected))

    def _open(self, path: Path, expected: Checksum) -> MappedFile:
        if path.exists():
            return MappedFile(path)
        name = object_name(self._link.folder, path.name, expected)
        download = partial(open_storage(self._link.address).download, name, expected)
        file = _try_again(
            lambda: self._files.cache.open(name, expected, download, self._files.close_half),
            self._pauses,
        )
        return MappedFile(Path(file.name), file)


def _try_again(download: Callable[[], BinaryIO], pauses: Sequence[int]) -> BinaryIO:
    """Download a file, again after pauses if it fails for a reason that may pass."""
    for pause in pauses:
        try:
            return download()
        except StorageError as error:
            logger.warning("%s (trying again in %s s)", error, pause)
            time.sleep(pause)
    return download()


def index_bytes(lengths: np.ndarray, images: np.ndarray) -> bytes:
    """Return the content of an index: lengths and images of documents, each [documents]."""
    file = BytesIO()
    np.save(file, np.stack([lengths, images]).astype(np.int32), allow_pickle=False)
    return file.getvalue()


def read_indices(link: Link, checksums: Mapping[str, Checksum]) -> np.ndarray:
    """Read the indices of some Arrow files at their address, not the files themselves.

    Args:
        checksums: size and checksum of each file, by its name, in the order of the documents.

    Returns:
        Lengths and numbers of images of the documents, int32 of shape [2, documents].
    """
    storage = open_storage(link.address)
    names = [
        object_name(link.folder, index_name(file), expected) for file, expected in checksums.items()
    ]
    found = storage.read_all(names)
    indices = [load_index(BytesIO(found[name]), f"{link.address}/{name}") for name in names]
    return np.concatenate([np.empty((2, 0), np.int32), *indices], axis=1)


def load_index(file: Path | BytesIO, name: object) -> np.ndarray:
    """Return lengths and numbers of images of documents, int32 of shape [2, documents].

    Args:
        file: its content, or its path: it is then mapped, so that the ranks of a machine share it.
        name: what messages call it.

    Raises:
        UserError: it is damaged, or something else.
    """
    try:
        mode: Literal["r"] | None = "r" if isinstance(file, Path) else None
        found: np.ndarray = np.load(file, mmap_mode=mode, allow_pickle=False)
        if found.dtype == np.int32 and found.ndim == 2 and len(found) == 2:
            return found
        reason = f"{found.dtype} of shape {list(found.shape)}"
    except OSError as error:
        reason = error_reason(error)
    except (ValueError, EOFError):  # whose message advises to unpickle it
        reason = "truncated, or no array"
    raise UserError(f"{name}: damaged ({reason}); remove it, and run `moma prepare --verify`")
