"""Integrity of a folder: size and checksum of each of its files, in `manifest.json`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moma.errors import UserError
from moma.files import Checksum, atomic_write, checksum

MANIFEST = "manifest.json"


def files_in_manifest(folder: Path) -> list[str]:
    """Names of the files that belong to a folder; other files in it are not to be read.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    try:
        return list(_read_manifest(folder))
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def write_manifest(folder: Path, entries: Mapping[str, Checksum]) -> None:
    """Write the manifest of a folder; names are relative to it."""
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in entries.items()}
    text = json.dumps({"files": files, "sha256": _hash(files)})
    atomic_write(folder / MANIFEST, text)


def find_damage(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Compare a folder's files with its manifest.

    Args:
        folder: holds a manifest.
        rank: this rank checks every `world_size`-th file, so that each file is read once.
        world_size: number of ranks.

    Returns:
        What is wrong, each entry with the name of its file; empty if the folder is intact.
    """
    try:
        files = _read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    found = []
    for name, expected in list(files.items())[rank::world_size]:
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            found.append(f"{name} has {size} bytes instead of {expected['bytes']}")
        elif checksum(path)[1] != expected["sha256"]:
            found.append(f"{name} has changed since it was written")
    return found


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["sha256"] == _hash(manifest["files"]):
            return dict(manifest["files"])
    except OSError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{MANIFEST} is damaged")


def _hash(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
