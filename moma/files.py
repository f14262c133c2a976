"""Files that are there whole or not at all, also after a power cut; folders held by one process."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moma.errors import UserError

UNFINISHED = ".writing"


def atomic_write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    with atomic_open(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is written and on the disk."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with add_path_to_errors(path):
        with unfinished.open("wb") as file:
            yield file
            sync_file(file)
        os.replace(unfinished, path)
        sync_folder(path.parent)


@contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Let an error of the system name a file: one of writing, such as of a full disk, does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def atomic_replace(path: Path, fill: Callable[[Path], object]) -> None:
    """Make a file or a folder that is there whole or not at all, also after a power cut.

    Args:
        path: a file, which may take the place of an older one, or a folder that is not there yet.
        fill: makes it at the path that it is given.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    fill(unfinished)
    for part in (unfinished, *unfinished.rglob("*")):
        sync_folder(part)
    os.replace(unfinished, path)
    sync_folder(path.parent)


def sync_file(file: BinaryIO) -> None:
    """Bring what was written to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring the names of a folder, or what a closed file holds, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_folder(folder: Path, patience: float) -> Iterator[None]:
    """Hold a folder against other processes; the system lets go of it however this one ends.

    Where the file system knows no locks, nobody is kept out.

    Args:
        folder: is there.
        patience: seconds to wait for another process to let go.

    Raises:
        UserError: it did not.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder, patience)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path, patience: float) -> None:
    import fcntl  # not on every system

    end, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"{folder}: another process is at work there; wait for its end, or choose "
                    "another folder"
                ) from error
        except OSError:
            return
        if not told:
            print(f"{folder}: waits for another process to end", file=sys.stderr)
        told = True
        time.sleep(0.2)
