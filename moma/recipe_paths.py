"""Paths and other text of recipes and of the command line, as they are written there."""

import errno
import os
import re
from pathlib import Path
from typing import Any

_PATH_LIMIT = 4096  # PATH_MAX of Linux


def require_unicode(text: str) -> str:
    """Return `text`.

    Raises:
        ValueError: it contains NUL or bytes that are not UTF-8.
    """
    if "\0" in text:
        raise ValueError("contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid UTF-8") from error
    return text


def is_address(value: str) -> bool:
    """Whether a value is an address such as `s3://…` or `https://…`."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE))


def refuse_address(value: str) -> str:
    """Return a value of a key that names files; raises `ValueError` for one such as `s3://…`."""
    if is_address(value):
        raise ValueError("is an address; copy it to this machine and give the path of the copy")
    return value


def parse_path(value: Any) -> Any:
    """Return a path as written in a recipe or on the command line; `~` is the home directory.

    Raises:
        ValueError: it is empty, too long, not UTF-8, an address such as `s3://…`, leads through a
            loop of symbolic links, or starts with the `~` of an unknown user.
    """
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError("should be a path in quotes")
    if not value.strip():
        raise ValueError("is empty; give a path (an unset shell variable is empty too)")
    if len(os.fsencode(require_unicode(value))) >= _PATH_LIMIT:
        raise ValueError(f"is too long: a path has fewer than {_PATH_LIMIT:,} bytes")
    try:
        path = Path(refuse_address(value)).expanduser()
    except RuntimeError as error:
        raise ValueError("no such user; write ./~… for a name that starts with ~") from error
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("leads through a loop of symbolic links; remove the link") from error
    return path
