"""Exit codes of errors, and printed commands."""

import errno
import os
import shlex
import shutil
from pathlib import Path

import pytest

from moma.cli import root as cli
from moma.errors import (
    LostRankError,
    SharedError,
    SharedStorageError,
    StoppedError,
    StorageError,
    error_reason,
    shell_command,
)
from moma.runtime.world import World, local_device, raise_on_all_ranks


def system(number: int) -> OSError:
    return OSError(number, os.strerror(number), "a/file")


def test_the_reason_of_an_error_is_on_one_line():
    assert error_reason(ValueError("no such key:\n  a")) == "no such key: a"
    assert error_reason(system(errno.EACCES)) == "Permission denied"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (SharedError("wrong"), 2, "moma: wrong"),
        (system(errno.EACCES), 2, "moma: a/file: Permission denied; choose another path"),
        (system(errno.ENOENT), 2, "moma: a/file: No such file or directory; choose another path"),
        (system(errno.EEXIST), 2, "moma: a/file: is not a folder; choose another path"),
        (system(errno.ENOSPC), 74, "moma: a/file: No space left on device; check the disk"),
        (system(errno.EIO), 74, "moma: a/file: Input/output error"),
        (shutil.Error([("a", "b", "[Errno 28] No space left")]), 74, "moma: cannot copy a: [Errno"),
        (StorageError("full"), 74, "moma: full"),
        (SharedStorageError("full"), 74, "moma: full"),
        (LostRankError("gone"), 1, "moma: gone"),
        (StoppedError("saved"), 75, "moma: saved"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, message):
    def app(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == code
    assert capsys.readouterr().err.startswith(message)


def test_printed_commands_can_be_pasted():
    command = shell_command("train", Path("./-my run/recipe.toml"), "run=it's", "--quiet")
    words = ["moma", "train", "./-my run/recipe.toml", "run=it's", "--quiet"]
    assert shlex.split(command) == words


def test_a_defect_keeps_its_traceback(monkeypatch):
    def app(**options: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # without a file name

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, SharedStorageError), (errno.EACCES, SharedError)]
)
def test_shared_errors_keep_their_kind(number, kind):
    with pytest.raises(SharedError) as message, raise_on_all_ranks(World(local_device())):
        raise system(number)
    assert type(message.value) is kind
