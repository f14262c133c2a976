"""Files that are there whole or not at all, also after a power cut."""

import os
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".writing"


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    unfinished = path.with_name(path.name + UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(text.encode())
        to_disk(file)
    os.replace(unfinished, path)
    sync_folder(path.parent)


def to_disk(file: BinaryIO) -> None:
    """Bring what was written to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring the names of a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
