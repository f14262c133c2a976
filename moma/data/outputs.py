"""What moma writes is never read as a source, even where it is inside of a source's folder.

A data folder and a run are recognized by their manifests, other folders by a marker file.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

DATA_MANIFEST = "provenance.json"
DATA_KIND: Literal["moma data"] = "moma data"
_RUN_MANIFEST, _RUN_KIND = "run.json", "moma run"
# Everything that `moma prepare` writes into a data folder.
DATA_ENTRIES = (
    DATA_MANIFEST,
    "tokenizer.json",
    "vocabulary.json",
    "codec",
    "codec_training",
    "rejected.jsonl",
    "shards",
)
_MARKER = ".moma-output"
_MARKER_TEXT = "Written by moma: sources skip this folder. Delete this file to change that.\n"


def exclude_outputs(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the names in a folder of a source without what moma wrote.

    Args:
        folder: a folder of a source.
        names: files and folders in it.
    """
    own = DATA_ENTRIES if has_manifest(folder, DATA_MANIFEST, DATA_KIND) else ()
    return [name for name in names if name not in own and not _is_output(folder / name)]


def mark_output(folder: Path) -> None:
    """Make a folder for files that are never a source; one that has other files stays unmarked."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / _MARKER).write_text(_MARKER_TEXT)


def _is_output(path: Path) -> bool:
    return os.path.isfile(path / _MARKER) or has_manifest(path, _RUN_MANIFEST, _RUN_KIND)


def has_manifest(folder: Path, name: str, kind: str) -> bool:
    """Return whether a folder has a manifest of moma; a user's file of that name is not one."""
    path = folder / name
    if not os.path.isfile(path):
        return False
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == kind
