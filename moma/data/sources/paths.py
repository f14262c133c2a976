"""File paths of sources: patterns, folders, paths inside a folder, fingerprints of files."""

import fnmatch
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from moma.data.outputs import exclude_outputs
from moma.errors import UserError, quote, shorten

_MAX_PATH_CHARACTERS = 4096
_BASE64 = re.compile(r"[\w+/=\s-]{200,}")


def resolve_inside(folder: Path, name: str) -> Path:
    """Return a path below a folder, with links resolved so that they cannot lead out either.

    Raises:
        UserError: the name leads out of the folder or is not a path.
    """
    if re.match(r"[a-z]+://", name, re.IGNORECASE):
        raise UserError(f"the image {quote(name)} is a web address; download it and give its path")
    if len(name) > _MAX_PATH_CHARACTERS or _BASE64.fullmatch(name):
        raise UserError(
            f"the image {quote(name)} is too long for a path; if it is base64, write "
            "data:image/png;base64, before it"
        )
    root = folder.resolve()
    try:
        path = (root / name).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a zero byte, a circle of links
        raise UserError(f"the image {quote(name)} is not a path ({shorten(str(error))})") from error
    if not path.is_relative_to(root):
        raise UserError(
            f"the image {quote(name)} is outside {folder}; "
            "copy it into the folder and give its path relative to it"
        )
    return path


def expand_pattern(pattern: Path) -> list[Path]:
    """Return the files that a path with `*`, `?`, `[…]` or `**` matches, sorted.

    A name that exists is taken literally, whatever characters it contains: `run[12]/*.jsonl` reads
    the folder `run[12]` where there is one. As in a shell, wildcards match no hidden names.

    Raises:
        UserError: there are none.
    """
    if not glob.has_magic(str(pattern)) or pattern.exists():
        return [pattern]
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    files = sorted({path for path in _expand(Path(pattern.anchor), parts) if path.is_file()})
    if not files:
        raise UserError(f"{pattern}: no file matches this pattern; check the source's 'path'")
    return files


def _expand(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below in _folders_below(folder):
            yield from _expand(below, rest or ("*",))
    elif not glob.has_magic(part) or (folder / part).exists():
        yield from _expand(folder / part, rest)
    elif folder.is_dir():
        for name in _names(folder):
            if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or name[0] != "."):
                yield from _expand(folder / name, rest)


def _folders_below(folder: Path) -> Iterator[Path]:
    """A folder and those below it, each once, even where links lead in circles."""
    waiting, seen = [folder], set()
    while waiting:
        current = waiting.pop()
        if not current.is_dir() or (real := current.resolve()) in seen:
            continue
        seen.add(real)
        yield current
        waiting += [current / name for name in reversed(_names(current)) if name[0] != "."]


def _names(folder: Path) -> list[str]:
    try:
        return sorted(exclude_outputs(folder, os.listdir(folder)))
    except OSError as error:
        raise unreadable(folder, error) from error


def files_below(folder: Path) -> list[Path]:
    """Return every file below a folder, sorted; without hidden ones and linked folders.

    Raises:
        UserError: the folder or one below it cannot be read.
    """
    files: list[Path] = []
    try:
        for parent, folders, names in os.walk(folder, onerror=_raise):
            folders[:] = [
                name for name in exclude_outputs(Path(parent), folders) if not name.startswith(".")
            ]
            files += [
                Path(parent, name)
                for name in exclude_outputs(Path(parent), names)
                if not name.startswith(".")
            ]
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from error
    return sorted(file for file in files if file.is_file())


def _raise(error: OSError) -> None:
    raise error


def fingerprint_of(files: Iterable[Path], optional: Iterable[Path] = ()) -> str:
    """Return a fingerprint of the names, sizes and modification times of files.

    Args:
        files: files that must exist.
        optional: files that may be missing.

    Raises:
        UserError: one of `files` is missing.
    """
    hashed = hashlib.sha256()
    for path, required in (*((p, True) for p in files), *((p, False) for p in optional)):
        try:
            status = path.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError) as error:
            if required:
                raise unreadable(path, error) from error
            state = "missing"
        hashed.update(f"{path} {state}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:16]


def unreadable(path: Path, error: Exception) -> UserError:
    """Return the error that says why a file or folder of a source cannot be read."""
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(f"{path}: cannot read it ({reason}); check the source's 'path'")
