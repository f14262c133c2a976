"""Shards whose Arrow files are at an address: opened through the cache when they are read."""

from collections.abc import Mapping
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from moma.data.mapped_files import MappedFile, OpenFiles
from moma.data.outputs import CACHE_FOLDER
from moma.data.remote.address import Address
from moma.data.remote.cache import Cache
from moma.data.remote.manifest import Name, check_checksum, object_name
from moma.data.remote.storage import open_storage
from moma.errors import UserError, error_reason
from moma.files import Checksum, read_bounded
from moma.recipe import Config

LINK_FILE = "remote.json"
# The files that a process keeps open have at most this part of the cache, unless one is larger.
_OPEN_SHARE = 1 / 16
# Each has a file descriptor.
_MAX_OPEN_FILES = 128


class Link(Config):
    """Where the Arrow files of a folder of shards are; stored in it as `remote.json`.

    Attributes:
        address: as `data.remote`.
        folder: folder of the objects below the address.
        cache_bytes: as `data.cache_bytes`.
        manifest: SHA-256 of the manifest that the folder was made from; empty if it was not.
    """

    address: Address
    folder: Name
    cache_bytes: int
    manifest: str = ""

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


def remote_files(folder: Path, link: Link, checksums: Mapping[str, Checksum]) -> OpenFiles:
    """Return the Arrow files of a folder of shards, those that are not there through the cache."""
    largest = max((size for size, _ in checksums.values()), default=0) or 1
    maximum = int(link.cache_bytes * _OPEN_SHARE / largest)
    files = _CachedFiles(folder, link, checksums)
    return OpenFiles(min(max(maximum, 1), _MAX_OPEN_FILES), files.open)


def cache_of(data: Path, cache_bytes: int) -> Cache:
    """Return the cache of a data folder."""
    return Cache(data / CACHE_FOLDER, cache_bytes)


class _CachedFiles:
    def __init__(self, folder: Path, link: Link, checksums: Mapping[str, Checksum]) -> None:
        self._link, self._checksums = link, checksums
        self._cache = cache_of(folder.parent.parent, link.cache_bytes)

    def open(self, path: Path) -> MappedFile:
        if path.exists():
            return MappedFile(path)
        expected = check_checksum(self._checksums[path.name])
        name = object_name(self._link.folder, path.name, expected)
        storage = open_storage(self._link.address)
        file = self._cache.open(name, expected, partial(storage.download, name, expected))
        return MappedFile(Path(file.name), file)


def index_bytes(lengths: np.ndarray, images: np.ndarray) -> bytes:
    """Return the content of an index: lengths and images of documents, each [documents]."""
    file = BytesIO()
    np.save(file, np.stack([lengths, images]).astype(np.int32), allow_pickle=False)
    return file.getvalue()


def parse_index(what: object, content: bytes) -> np.ndarray:
    """Return lengths and numbers of images of documents, int32 of shape [2, documents].

    Raises:
        UserError: `content` is none, or damaged; the message names `what` has it.
    """
    try:
        found: np.ndarray = np.load(BytesIO(content), allow_pickle=False)
        if found.dtype == np.int32 and found.ndim == 2 and len(found) == 2:
            return found
        reason = f"{found.dtype} of shape {list(found.shape)}"
    except (OSError, ValueError, EOFError) as error:
        reason = error_reason(error)
    raise UserError(f"{what}: damaged ({reason}); remove it, and run `moma prepare --verify`")
