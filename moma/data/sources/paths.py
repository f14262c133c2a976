"""File paths of sources: patterns, folders, paths inside a folder, fingerprints, read errors."""

import fnmatch
import glob
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from moma.data.outputs import exclude_outputs
from moma.data.sources.listings import listed_once
from moma.errors import StorageError, UserError, error_reason, quote, shorten, storage_error
from moma.recipe_paths import is_address

_MAX_PATH_CHARACTERS = 4096
_BASE64 = re.compile(r"[\w+/=\s-]{200,}")


class FileRange(NamedTuple):
    """A range of a file.

    Attributes:
        path: the file.
        begin, end: offsets of rows, as the kind of file counts them; `end` is None for the end of
            the file.
        row: number of rows before `begin`.
    """

    path: Path
    begin: int = 0
    end: int | None = None
    row: int = 0


def resolve_inside(folder: Path, name: str) -> Path:
    """Return a path below a folder, with links resolved so that they cannot lead out either.

    Raises:
        UserError: the name leads out of the folder or is not a path.
    """
    if is_address(name):
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
        raise UserError(
            f"the image {quote(name)} is not a path ({shorten(str(error))}); correct it"
        ) from error
    if not path.is_relative_to(root):
        raise UserError(
            f"the image {quote(name)} is outside {folder}; "
            "copy it into the folder and give its path relative to it"
        )
    return path


@listed_once
def expand_pattern(pattern: Path) -> list[Path]:
    """Return the files that a path with `*`, `?`, `[…]` or `**` matches, sorted.

    A name that exists is taken literally, whatever characters it contains: `run[12]/*.jsonl` reads
    the folder `run[12]` where there is one. As in a shell, wildcards match no hidden names. What
    moma wrote is not matched.

    Raises:
        UserError: there are none.
    """
    if os.path.exists(pattern) and not (os.path.isfile(pattern) or os.path.isdir(pattern)):
        raise UserError(f"{pattern}: is not a regular file; check the source's 'path'")
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
    if not glob.has_magic(part) or (folder / part).exists():
        yield from _expand(folder / part, rest)
    elif part == "**" and folder.is_dir():
        for below, _ in _walk(folder, follow_links=True):
            yield from _expand(below, rest or ("*",))
    elif folder.is_dir():
        for name in (entry.name for entry in _entries(folder)):
            if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or name[0] != "."):
                yield from _expand(folder / name, rest)


def _walk(folder: Path, follow_links: bool) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and those below it, each once even where links form a cycle, and their files."""
    waiting, seen = [folder], set()
    while waiting:
        current = waiting.pop()
        if (real := current.resolve()) in seen:
            continue
        seen.add(real)
        entries = [entry for entry in _entries(current) if entry.name[0] != "."]
        # A path, unlike an entry, may be a link in a circle.
        kinds = [Path(entry) if entry.is_symlink() else entry for entry in entries]
        yield current, [current / kind.name for kind in kinds if kind.is_file()]
        folders = [kind for kind in kinds if kind.is_dir()]
        waiting += [
            current / kind.name for kind in folders if follow_links or not isinstance(kind, Path)
        ]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with read_errors(folder), os.scandir(folder) as found:
        entries = {entry.name: entry for entry in found}
    return [entries[name] for name in sorted(exclude_outputs(folder, entries))]


@listed_once
def files_below(folder: Path) -> list[Path]:
    """Return every file below a folder, sorted; not hidden ones, linked folders, or moma's output.

    Raises:
        UserError: the folder or one below it cannot be read.
    """
    walked = _walk(folder, follow_links=False)
    return sorted(path for _, files in walked for path in files)


def outputs_below(folder: Path) -> list[Path]:
    """Return the folders and files below a folder that moma wrote."""
    outputs: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        kept = set(exclude_outputs(Path(parent), [*folders, *names]))
        outputs += [Path(parent, name) for name in (*folders, *names) if name not in kept]
        folders[:] = [name for name in folders if name in kept]
    return outputs


def fingerprint_of(files: Iterable[Path], optional: Iterable[Path] = ()) -> str:
    """Return a fingerprint of the names, sizes and modification times of files.

    Raises:
        UserError: one of `files` is missing; those of `optional` may be.
    """
    hashed = hashlib.sha256()
    for path, required in (*((p, True) for p in files), *((p, False) for p in optional)):
        try:
            status = path.stat()
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError) as error:
            described = read_error(path, error)
            if required or isinstance(described, StorageError):
                raise described from error
            state = "missing"
        hashed.update(f"{path} {state}\n".encode("utf-8", "surrogateescape"))
    return hashed.hexdigest()[:16]


@contextmanager
def read_errors(
    path: Path | str, remedy: str = "check the source's 'path'", *others: type[Exception]
) -> Iterator[None]:
    """Turn errors of reading a file, compressed or not, and `others`, into a `read_error`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, *others) as error:
        raise read_error(path, error, remedy) from error


def read_error(
    path: Path | str, error: Exception, remedy: str = "check the source's 'path'"
) -> UserError:
    """Return why a file or folder cannot be read; a `StorageError` if its disk fails."""
    reason = shorten(error_reason(error), 300)
    message = f"{path}: cannot read it ({reason}); {remedy}"
    return storage_error(error, path) or UserError(message)
