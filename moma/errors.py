"""Errors that are meant for the person at the keyboard, each with its exit code."""

import errno
import json
import shlex
import shutil
from collections.abc import Iterable

# What a disk or a network's file system says when it is full or ails; it may be well again later.
_AILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE, errno.EROFS)


class UserError(Exception):
    """Bad input: the message names the file, key or row at fault and the way out.

    The command line prints the message alone and exits with `CODE`; every other exception is a
    defect of the program and keeps its traceback.
    """

    CODE = 2


class SharedError(UserError):
    """A `UserError` that all ranks of a job raise alike: the first one tells it for all."""


class StorageError(UserError):
    """Something could not be written or read: the disk is full, say; later it may work.

    The command line exits with `CODE`, "input/output error" in sysexits.h, on which job scripts
    begin again, a few times.
    """

    CODE = 74


class SharedStorageError(SharedError, StorageError):
    """A `StorageError` that all ranks of a job raise alike."""

    CODE = StorageError.CODE


class LostRankError(Exception):
    """Another process of the job ended or does not answer; the job can begin again.

    The command line prints the message and exits with code 1, on which launchers restart the job.
    """


class StoppedError(Exception):
    """A signal ended the work early; what was done is saved, and the same command goes on.

    The command line exits with `CODE`, "try again later" in sysexits.h, on which job scripts put
    the job back into the queue.
    """

    CODE = 75


def os_error_message(error: OSError) -> UserError | None:
    """What the system said of a file, as a message; None if it speaks of a defect."""
    if isinstance(error, shutil.Error):  # of a folder: source, copy and reason of each file
        return StorageError(f"cannot copy {error.args[0][0][0]}: {error.args[0][0][2]}")
    told = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if error.errno in _AILING:
        return StorageError(f"{told}; see to the disk, and the same command goes on")
    return None if error.filename is None else UserError(f"{told}; choose another path")


def json_error_message(error: Exception) -> str:
    """What is wrong with JSON, and at which character: a line's number would seem the row's."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: character {error.pos + 1}"
    return str(error)


def shell_command(*arguments: object) -> str:
    """A `moma` command line that does what is meant when it is pasted into a shell.

    Arguments are quoted where a shell would change them; a path that starts with a dash, which
    would be taken for an option, must come as `key=value` or with `./` in front.
    """
    return shlex.join(["moma", *map(str, arguments)])


def shorten(text: str, limit: int = 600) -> str:
    """Return a text of at most `limit` characters: the middle of a longer one is left out."""
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 3]} … {text[-end:]}"


def quote(text: str, limit: int = 100) -> str:
    """Return a text in quotes, on one line, at most about `limit` characters of it."""
    return repr(shorten(text, limit))


def list_names(names: Iterable[str], limit: int = 20) -> str:
    """Return up to `limit` names separated by commas, each shortened, or "none"."""
    listed = list(names)
    shown = [shorten(name, 60) for name in listed[:limit]]
    more = [f"… ({len(listed) - limit} more)"] if len(listed) > limit else []
    return ", ".join([*shown, *more]) or "none"
