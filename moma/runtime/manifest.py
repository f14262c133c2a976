"""Integrity of a folder: size and checksum of each of its files, in `manifest.json`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moma.files import Checksum, atomic_write, checksum

MANIFEST = "manifest.json"


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
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        damaged = manifest["sha256"] != _hash(files)
    except OSError:
        return [f"{MANIFEST} is missing"]
    except (ValueError, KeyError, TypeError, RecursionError):
        damaged = True
    if damaged:
        return [f"{MANIFEST} is damaged"]
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


def _hash(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
