"""Integrity of a folder: size and checksum of each of its files, in `manifest.json`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moma.errors import UserError
from moma.files import Checksum, atomic_write, checksum, read_bounded

MANIFEST = "manifest.json"


def write_manifest(folder: Path, entries: Mapping[str, Checksum]) -> None:
    """Write the manifest of a folder; names are relative to it."""
    files = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in entries.items()}
    text = json.dumps({"files": files, "sha256": _hash(files)})
    atomic_write(folder / MANIFEST, text)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of each file that belongs to a folder; others are not to be read.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_bounded(path))
        if manifest["sha256"] == _hash(manifest["files"]):
            return dict(manifest["files"])
    except OSError as error:
        raise UserError(f"{path}: is missing") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: is damaged")


def find_damage(folder: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """Compare a folder's files with its manifest.

    Returns:
        What is wrong, by file; empty if the folder is intact. A rank checks its part of the files.
    """
    try:
        files = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    found = []
    for name, expected in list(files.items())[rank::world_size]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: is missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            found.append(f"{path}: has {size} bytes instead of {expected['bytes']}")
        elif checksum(path)[1] != expected["sha256"]:
            found.append(f"{path}: has changed since it was written")
    return found


def _hash(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
