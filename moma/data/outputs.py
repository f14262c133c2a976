"""Keeps what moma writes from being read as a source, also inside of a source's folder.

A data folder and a run are recognized by their manifests, everything else by a marker file.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from moma.files import UNFINISHED, atomic_write

DATA_MANIFEST = "provenance.json"
DATA_KIND: Literal["moma data"] = "moma data"
_RUN_MANIFEST, _RUN_KIND = "run.json", "moma run"
TOKENIZER_ENTRIES = ("tokenizer.json", "vocabulary.json", "codec", "codec_training")
# Everything that `moma prepare` writes into a data folder.
DATA_ENTRIES = (DATA_MANIFEST, *TOKENIZER_ENTRIES, "rejected.jsonl", "shards")
_MARKER, _MARKER_KIND = ".moma-output.json", "moma output"
_ABOUT = "written by moma, so no source reads it; delete this file to change that"
_EVERYTHING = "*"


def exclude_outputs(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names in a folder of a source without what moma wrote.

    A folder that moma made is excluded as a whole from its parent folder; a source whose `path` is
    that folder itself reads it.

    Args:
        folder: a folder of a source.
        names: files and folders in it.
    """
    own = _marked(folder)
    if has_manifest(folder, DATA_MANIFEST, DATA_KIND):
        own |= {*DATA_ENTRIES}
    return [
        name
        for name in names
        if name.removesuffix(UNFINISHED) not in own
        and _EVERYTHING not in _marked(folder / name)
        and not has_manifest(folder / name, _RUN_MANIFEST, _RUN_KIND)
    ]


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
        marker = {"kind": _MARKER_KIND, "about": _ABOUT, "names": sorted({*own, *names})}
        atomic_write(folder / _MARKER, json.dumps(marker) + "\n")


def has_manifest(folder: Path, name: str, kind: str) -> bool:
    """Return whether a folder has a manifest of moma; a user's file of that name is not one."""
    return _read_manifest(folder / name, kind) is not None


def _marked(folder: Path) -> set[str]:
    marker = _read_manifest(folder / _MARKER, _MARKER_KIND) or {}
    return {name for name in marker.get("names", ()) if isinstance(name, str)}


def _read_manifest(path: Path, kind: str) -> dict[str, Any] | None:
    if not os.path.isfile(path):
        return None
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("kind") == kind else None
