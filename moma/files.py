"""Atomic writes that survive a power cut, checksums, JSON files and folder locks."""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from moma.errors import UserError, json_error_message

UNFINISHED = ".writing"
# Files that are parsed whole; a vocabulary of the largest size has 170 MB.
MAX_BYTES = 2**28
Checksum = tuple[int, str]
logger = logging.getLogger(__name__)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file so that either the old or the new content exists at any time."""
    with atomic_open(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` once its content is synced to disk."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with add_path_to_errors(path):
        with unfinished.open("wb") as file:
            yield file
            sync_file(file)
        os.replace(unfinished, path)
        sync_folder(path.parent)


def atomic_replace(path: Path, fill: Callable[[Path], object]) -> None:
    """Create a file, or a new folder, that appears only when it is complete and synced.

    `fill` creates the content at the temporary path that it is called with.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    fill(unfinished)
    for part in (unfinished, *unfinished.rglob("*")):
        sync_folder(part)
    os.replace(unfinished, path)
    sync_folder(path.parent)


@contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Add the path to an `OSError` that names none, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def sync_file(file: BinaryIO) -> None:
    """Flush an open file and sync its content to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Sync a folder's entries, or a closed file's content, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened, or is a device or pipe, which may have no end.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def read_bounded(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole file.

    Raises:
        OSError: as for `open_regular`, or the file is larger than `max_bytes`.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EINVAL, f"larger than {max_bytes >> 20} MiB", str(path))
    return content


def checksum(path: Path) -> Checksum:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: bytes) -> str:
    """Short hash that tells contents apart."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `UserError` if it is missing, not JSON or has duplicate keys."""
    try:
        return json.loads(read_bounded(path), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read ({error.strerror}); restore it, or choose another folder"
        ) from error
    except (ValueError, RecursionError) as error:
        message = json_error_message(error)
        raise UserError(f"{path}: not valid JSON ({message}); restore it from a copy") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} occurs twice")
    return values


@contextmanager
def lock_folder(folder: Path, timeout: float) -> Iterator[None]:
    """Hold an exclusive lock on a folder; the system releases it however this process ends.

    Waits up to `timeout` seconds for another process. Does nothing on a file system without locks.

    Raises:
        UserError: the lock was not released in time.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder, timeout)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, timeout: float) -> None:
    import fcntl  # not available on every system

    end, logged = time.monotonic() + timeout, False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"{folder}: in use by another process; wait until it ends, or choose another "
                    "folder"
                ) from error
        except OSError:
            return
        if not logged:
            logger.warning("%s: waiting for another process to end", folder)
        logged = True
        time.sleep(0.2)
