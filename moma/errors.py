"""Errors that are meant for the user, each with its exit code."""

import errno
import json
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

# Errors of a disk or network file system that may be temporary.
_STORAGE_ERRNOS = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ESTALE,
    errno.EROFS,
)


class UserError(Exception):
    """Bad input: the message names the file, key or row and what to do about it.

    The command line prints only the message and exits with `CODE`.
    """

    CODE = 2


class SharedError(UserError):
    """A `UserError` that every rank of a job raises; the command line prints it on rank 0 only."""


class StorageError(UserError):
    """A file could not be written or read, for example because the disk is full.

    The exit code is "input/output error" in sysexits.h; job scripts restart the job a few times.
    """

    CODE = 74


class SharedStorageError(SharedError, StorageError):
    """A `StorageError` that every rank of a job raises."""

    CODE = StorageError.CODE


class LostRankError(Exception):
    """Another process of the job ended or does not respond.

    The command line prints the message and exits with code 1, on which launchers restart the job.
    """


class StoppedError(Exception):
    """A signal ended the work early; progress is saved, and the same command resumes.

    The exit code is "try again later" in sysexits.h, on which job scripts requeue the job.
    """

    CODE = 75


def to_user_error(error: OSError) -> UserError | None:
    """Return the `UserError` for a system error about a file; None if it is about no file."""
    if isinstance(error, shutil.Error):  # of a folder: source, copy and reason of each file
        source, _, reason = error.args[0][0]
        return StorageError(f"cannot copy {source}: {reason}; check the disk, then run it again")
    if described := storage_error(error, error.filename):
        return described
    if error.filename is None:
        return None
    # Raised where a folder should be made.
    reason = "is not a folder" if isinstance(error, FileExistsError) else error.strerror
    return UserError(f"{error.filename}: {reason}; choose another path")


def storage_error(error: BaseException, what: object) -> StorageError | None:
    """Return a `StorageError`, about `what` if it is not None, if a disk fails, else None."""
    if not isinstance(error, OSError) or error.errno not in _STORAGE_ERRNOS:
        return None
    message = str(error.strerror) if what is None else f"{what}: {error.strerror}"
    return StorageError(f"{message}; check the disk, then run the same command to resume")


def error_reason(error: BaseException) -> str:
    """What is wrong, as `error_text`, on one line."""
    return " ".join(error_text(error).split())


def error_text(error: BaseException) -> str:
    """What is wrong, perhaps on many lines, without the path that an `OSError` repeats."""
    return str(getattr(error, "strerror", None) or error)


def json_error_message(error: Exception) -> str:
    """What is wrong with JSON, by character: a line number would be mistaken for the file's."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: character {error.pos + 1}"
    return str(error)


def shell_command(*arguments: object) -> str:
    """A `moma` command line to paste into a shell: quoted, and no path is taken for an option."""
    words = (
        f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word)
        for word in arguments
    )
    return shlex.join(["moma", *words])


def shorten(text: str, limit: int = 600) -> str:
    """Return a text of at most `limit` characters: the middle of a longer one is left out."""
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 3]} … {text[-end:]}"


def quote(text: str) -> str:
    """Return a text in quotes, on one line, at most about 100 characters of it."""
    return repr(shorten(text, 100))


def list_names(names: Iterable[str], limit: int = 20) -> str:
    """Return up to `limit` names separated by commas, each shortened, or "none"."""
    listed = list(names)
    shown = [shorten(name, 60) for name in listed[:limit]]
    more = [f"… ({len(listed) - limit} more)"] if len(listed) > limit else []
    return ", ".join([*shown, *more]) or "none"
