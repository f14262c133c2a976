"""The cache: bounded, shared by processes, and never without a file that is being read."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from moma.data.remote.cache import Cache
from moma.errors import UserError


def content_of(name, size=100):
    return (name * size)[:size].encode()


def checksum_of(content):
    return len(content), hashlib.sha256(content).hexdigest()


def fetch(cache: Cache, name: str, size: int = 100, log: list[str] | None = None, **options):
    """Open a file, which is written into the cache if it is not there."""

    def download(file):
        if log is not None:
            log.append(name)
        file.write(content_of(name, size))

    return cache.open(name, checksum_of(content_of(name, size)), download, **options)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix)


def test_a_file_is_downloaded_once(tmp_path):
    log: list[str] = []
    cache = Cache(tmp_path, 1000)
    for _ in range(3):
        with fetch(cache, "a/x.arrow", log=log) as file:
            assert file.read() == content_of("a/x.arrow")
    assert log == ["a/x.arrow"]
    assert names(tmp_path) == ["x.arrow"]


def test_the_least_recently_opened_files_are_removed(tmp_path):
    log: list[str] = []
    cache = Cache(tmp_path, 300)
    for name in ("a.x", "b.x", "c.x", "a.x", "d.x"):
        fetch(cache, name, log=log).close()
        time.sleep(0.02)
    assert names(tmp_path) == ["a.x", "c.x", "d.x"]
    assert log == ["a.x", "b.x", "c.x", "d.x"]


def test_an_open_file_is_not_removed(tmp_path):
    cache = Cache(tmp_path, 200)
    with fetch(cache, "a.x") as first:
        fetch(cache, "b.x").close()
        fetch(cache, "c.x").close()
        assert names(tmp_path) == ["a.x", "c.x"]
        assert first.read() == content_of("a.x")


def test_without_room_the_cache_exceeds_its_size_and_warns_once(tmp_path, capsys):
    cache = Cache(tmp_path, 200)
    with fetch(cache, "a.x"), fetch(cache, "b.x"):
        assert capsys.readouterr().err == ""
        for name in ("c.x", "d.x", "e.x"):
            assert fetch(cache, name).read() == content_of(name)
        assert capsys.readouterr().err == (
            f"moma: {tmp_path}: exceeds data.cache_bytes = 200, because other processes read all "
            "files that are in it; increase it if the disk has space\n"
        )
    fetch(cache, "f.x").close()
    assert len(names(tmp_path)) == 2


def test_without_room_files_of_the_caller_are_closed_first(tmp_path, capsys):
    cache = Cache(tmp_path, 300)
    mine = [fetch(cache, name) for name in ("a.x", "b.x", "c.x")]

    def close_one():
        if mine:
            mine.pop(0).close()
            return True
        return False

    fetch(cache, "d.x", close_files=close_one)
    assert names(tmp_path) == ["b.x", "c.x", "d.x"]
    assert capsys.readouterr().err == ""


def test_what_a_failed_download_wrote_is_removed(tmp_path):
    def fail(file):
        file.write(b"half")
        raise UserError("damaged")

    cache = Cache(tmp_path, 300)
    with pytest.raises(UserError, match="damaged"):
        cache.open("a.x", checksum_of(b"whole"), fail)
    assert names(tmp_path) == []
    assert fetch(cache, "a.x").read() == content_of("a.x")


def test_what_a_killed_process_left_is_replaced_and_counts_until_then(tmp_path):
    (tmp_path / "a.x.writing").write_bytes(b"?" * 250)
    os.utime(tmp_path / "a.x.writing", (0, 0))
    cache = Cache(tmp_path, 300)
    fetch(cache, "b.x").close()
    assert names(tmp_path) == ["b.x"]
    (tmp_path / "a.x.writing").write_bytes(b"?" * 150)
    assert fetch(cache, "a.x").read() == content_of("a.x")


def test_a_file_of_another_size_is_downloaded_again(tmp_path):
    log: list[str] = []
    cache = Cache(tmp_path, 300)
    (tmp_path / "a.x").write_bytes(b"short")
    assert fetch(cache, "a.x", log=log).read() == content_of("a.x")
    assert log == ["a.x"]


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def fail(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match=r"no locks .*choose a data\.path on another"):
        fetch(Cache(tmp_path, 300), "a.x")
    assert "a.x" not in names(tmp_path)


def test_an_adopted_file_is_moved_or_removed(tmp_path):
    cache = Cache(tmp_path / "cache", 100)
    for size, expected in ((100, ["a.x"]), (101, [])):
        (tmp_path / "source").write_bytes(content_of("a.x", size))
        cache.adopt(tmp_path / "source", "a.x" if size == 100 else "b.x")
        assert not (tmp_path / "source").exists()
        if expected:
            log: list[str] = []
            assert fetch(cache, "a.x", log=log).read() == content_of("a.x") and not log
    assert "b.x" not in names(tmp_path)


def test_a_file_of_another_disk_is_not_adopted(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "source").write_bytes(content_of("a.x"))
    monkeypatch.setattr(os, "replace", fail)
    Cache(tmp_path / "cache", 100).adopt(tmp_path / "source", "a.x")
    assert not list(tmp_path.rglob("*.x")) and not (tmp_path / "source").exists()


def test_threads_download_a_file_once(tmp_path):
    log: list[str] = []
    cache, found = Cache(tmp_path, 300), []

    def read():
        found.append(fetch(cache, "a.x", log=log).read())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content_of("a.x")] * 8
    assert log == ["a.x"]


def read_randomly(folder: Path, seed: int, failures) -> None:
    """Read files in random order, more of them than fit."""
    import random

    draw, cache = random.Random(seed), Cache(folder, 400)
    for _ in range(60):
        name = f"{draw.randrange(8)}.x"
        with fetch(cache, name) as file:
            if file.read() != content_of(name):
                failures.put(name)
        with cache.locked():  # otherwise a file may be renamed
            files = {status.st_ino: status.st_size for status in statuses(folder)}
        if sum(files.values()) > 400:
            failures.put(files)


def statuses(folder):
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            yield path.stat()


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    processes = [
        context.Process(target=read_randomly, args=(tmp_path, seed, failures)) for seed in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert failures.empty(), failures.get()
