"""Files that are there whole or not at all, also after a power cut."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".writing"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    with writing_whole(path) as file:
        file.write(text.encode())


@contextmanager
def writing_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all of it is written and on the disk."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as file:
        yield file
        to_disk(file)
    os.replace(unfinished, path)
    sync_folder(path.parent)


def place_whole(path: Path, fill: Callable[[Path], object]) -> None:
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


def to_disk(file: BinaryIO) -> None:
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
