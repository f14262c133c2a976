"""Files of a limited size together, shared by all processes of a machine that read them.

An open file has a shared lock, so that no process removes it. If the open ones leave no room, the
folder exceeds its size instead of stopping training. The one that downloads a file has an
exclusive lock on it under its temporary name. Sizes are added up under one lock of the folder.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moma.errors import UserError, error_reason
from moma.files import UNFINISHED, Checksum, sync_file

LOCK_FILE = ".lock"
logger = logging.getLogger(__name__)


class Cache:
    """Files in a folder, of which the least recently opened are removed."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes, self._warned = folder, max_bytes, False

    def open(
        self,
        name: str,
        expected: Checksum,
        download: Callable[[BinaryIO], None],
        close_files: Callable[[], bool] = lambda: False,
    ) -> BinaryIO:
        """Open a file, which is not removed before it is closed.

        Args:
            name: relative path; the same name always has the same content.
            expected: its size and checksum.
            download: writes the content; raises if it is not what is expected.
            close_files: closes files of the caller, of which others may need the room; returns
                False if none is left.
        """
        path = self._folder / name
        while (file := self._open_existing(path, expected[0])) is None:
            self._download(path, expected[0], download, close_files)
        return file

    def adopt(self, source: Path, name: str) -> None:
        """Move a file of this file system into the cache; remove it if it does not fit."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if self._make_room(source.stat().st_size):
                with suppress(OSError):  # the cache may be on another disk
                    os.replace(source, path)
            source.unlink(missing_ok=True)

    def _open_existing(self, path: Path, size: int) -> BinaryIO | None:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        _lock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if status.st_nlink and status.st_size == size:
            with suppress(OSError):
                os.utime(path)
            return file
        if status.st_nlink:  # damaged, for example by a power failure
            path.unlink(missing_ok=True)
        file.close()
        return None

    def _download(
        self,
        path: Path,
        size: int,
        download: Callable[[BinaryIO], None],
        close_files: Callable[[], bool],
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + UNFINISHED)
        with open(unfinished, "r+b", opener=_open_or_create) as file:
            _lock(file, fcntl.LOCK_EX)  # another process may download it
            if not _is_at(file, unfinished):
                return
            try:
                if path.exists():
                    return
                self._reserve(file, size, close_files)
                download(file)
                sync_file(file)
                with self.locked():  # so that it is counted once
                    os.replace(unfinished, path)
            finally:
                if _is_at(file, unfinished):
                    unfinished.unlink()

    def _reserve(self, file: BinaryIO, size: int, close_files: Callable[[], bool]) -> None:
        with self.locked():
            file.truncate(0)
            while not (fits := self._make_room(size)) and close_files():
                pass
            file.truncate(size)  # other processes count it
        if not fits and not self._warned:
            self._warned = True
            logger.warning(
                "%s: exceeds data.cache_bytes = %s, because other processes read all files that "
                "are in it; increase it if the disk has space",
                self._folder,
                f"{self._max_bytes:,}",
            )

    def _make_room(self, size: int) -> bool:
        """Remove the least recently opened files, until `size` more bytes fit."""
        found = sorted(_files(self._folder))
        total = size + sum(size for _, size, _ in found)
        for _, freed, path in found:
            if total <= self._max_bytes:
                break
            if freed and _remove(path):
                total -= freed
        return total <= self._max_bytes

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process adds, renames or removes a file meanwhile."""
        with (self._folder / LOCK_FILE).open("wb") as file:
            _lock(file, fcntl.LOCK_EX)
            yield


def _open_or_create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _remove(path: Path) -> bool:
    """Remove a file unless a process has it locked."""
    try:
        with path.open("rb") as file:
            if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            path.unlink()
    except FileNotFoundError:
        pass
    return True


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield when each file was last opened, its size and its path."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                yield from _files(path)
            elif entry.name != LOCK_FILE:
                with suppress(FileNotFoundError):  # removed because its download failed
                    status = path.stat()
                    yield status.st_mtime, status.st_size, path


def _lock(file: BinaryIO, operation: int) -> bool:
    """Lock an open file until it is closed; raises `UserError` if its file system cannot."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name}: the file system has no locks ({error_reason(error)}), without which "
            "processes cannot share a cache; choose a data.path on another, such as a local disk"
        ) from error
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether a path names an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
