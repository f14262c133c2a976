"""Keeps what moma writes from being read as a source, also inside of a source's folder.

A data folder and a run are recognized by their manifests, everything else by a marker file. The
marker also has checksums of reports and images, so that no file of the user's is replaced.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from moma.errors import UserError
from moma.files import UNFINISHED, atomic_open, atomic_write, checksum, read_bounded

DATA_MANIFEST = "provenance.json"
DATA_KIND: Literal["moma data"] = "moma data"
_RUN_MANIFEST, _RUN_KIND = "run.json", "moma run"
TOKENIZER_ENTRIES = ("tokenizer.json", "vocabulary.json", "codec", "codec_training")
CLEANING_FOLDER = "cleaning"
CACHE_FOLDER = "cache"
# Everything that moma writes into a data folder.
DATA_ENTRIES = (
    DATA_MANIFEST,
    *TOKENIZER_ENTRIES,
    "rejected.jsonl",
    "shards",
    CLEANING_FOLDER,
    CACHE_FOLDER,
)
_MARKER, _MARKER_KIND = ".moma-output.json", "moma output"
_ABOUT = "written by moma, so no source reads it; delete this file to change that"
_EVERYTHING = "*"


def exclude_outputs(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names in a folder of a source without what moma wrote.

    A folder that moma made is excluded as a whole from its parent folder; a source whose `path` is
    that folder itself reads it.
    """
    own = _marked(folder)
    if has_manifest(folder, DATA_MANIFEST, DATA_KIND):
        own |= {*DATA_ENTRIES}
    return [
        name
        for name in names
        if name.removesuffix(UNFINISHED) not in own
        and not (os.path.isdir(path := folder / name) and _is_made(path))
    ]


def _is_made(folder: Path) -> bool:
    """Whether moma made a folder."""
    return _EVERYTHING in _marked(folder) or has_manifest(folder, _RUN_MANIFEST, _RUN_KIND)


def is_output(path: Path) -> bool:
    """Return whether moma writes, or has written, a file or folder of this name in its folder."""
    is_own_folder = _EVERYTHING in _marked(path.parent)
    return is_own_folder or not exclude_outputs(path.parent, [path.name])


def mark_output(folder: Path, *names: str) -> None:
    """Record what moma writes into a folder: everything if it is new or empty, else the names.

    Args:
        folder: created if it does not exist.
        names: files and folders that are about to be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = _marked(folder)
    names = tuple(exclude_outputs(folder, names)) if any(folder.iterdir()) else (_EVERYTHING,)
    if names and _EVERYTHING not in own:
        _update_marker(folder, names=sorted({*own, *names}))


def write_output(path: Path, content: bytes) -> None:
    """Write a file atomically, and record it in the marker.

    Raises:
        UserError: the file exists and is not as moma wrote it; see `require_replaceable`.
    """
    require_replaceable(path)
    mark_output(path.parent, path.name)
    checksums = _checksums(path.parent) | {path.name: hashlib.sha256(content).hexdigest()}
    _update_marker(path.parent, checksums=checksums)
    with atomic_open(path) as file:
        file.write(content)


def require_replaceable(path: Path) -> None:
    """Raise `UserError` if a file exists that moma did not write, or that was changed since."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file in it")
    if not os.path.lexists(path):
        return
    known = _checksums(path.parent).get(path.name)
    if not path.is_file() or checksum(path)[1] != known:
        raise UserError(
            f"{path}: exists, and moma did not write it there or it was changed since; rename it, "
            "or choose another --out"
        )


def has_manifest(folder: Path, name: str, kind: str) -> bool:
    """Return whether a folder has a manifest of moma; a user's file of that name is not one."""
    return _read_manifest(folder / name, kind) is not None


def _update_marker(folder: Path, **changes: Any) -> None:
    marker = _read_manifest(folder / _MARKER, _MARKER_KIND) or {"names": []}
    marker |= {"kind": _MARKER_KIND, "about": _ABOUT, **changes}
    atomic_write(folder / _MARKER, json.dumps(marker) + "\n")


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that `write_output` wrote into a folder, by name."""
    marker = _read_manifest(folder / _MARKER, _MARKER_KIND) or {}
    found = marker.get("checksums")
    return found if isinstance(found, dict) else {}


def _marked(folder: Path) -> set[str]:
    marker = _read_manifest(folder / _MARKER, _MARKER_KIND) or {}
    return {name for name in marker.get("names", ()) if isinstance(name, str)}


def _read_manifest(path: Path, kind: str) -> dict[str, Any] | None:
    if not os.path.isfile(path):
        return None
    try:
        manifest = json.loads(read_bounded(path))
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("kind") == kind else None
