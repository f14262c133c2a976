"""Whether a folder is whole: the size and checksum of each of its files, in `manifest.json`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moma.errors import UserError
from moma.files import sync_file

MANIFEST = "manifest.json"
Entry = tuple[int, str]


def checksum(path: Path) -> Entry:
    """Bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write what the folder's files are; names are relative to it."""
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in entries.items()}
    write_json(folder / MANIFEST, {"files": files, "sha256": _digest(files)})


def find_faults(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with a folder's files, each naming its file; empty if it is whole.

    Args:
        folder: holds a manifest.
        rank: the files are shared out between ranks, so that each is read once.
        world_size: number of ranks.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        damaged = manifest["sha256"] != _digest(files)
    except OSError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError):
        damaged = True
    if damaged:
        return [f"{MANIFEST} is damaged"]
    faults = []
    for name, expected in list(files.items())[rank::world_size]:
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            faults.append(f"{name} has {size} bytes instead of {expected['bytes']}")
        elif checksum(path)[1] != expected["sha256"]:
            faults.append(f"{name} has changed since it was written")
    return faults


def _digest(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is on the disk when this returns."""
    with path.open("wb") as file:
        file.write(json.dumps(value).encode())
        sync_file(file)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the checkpoint ({error})") from error
