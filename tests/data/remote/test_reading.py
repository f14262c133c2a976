"""Shards at an address, read by several processes through one cache smaller than the shards."""

import os
import random
from io import BytesIO
from pathlib import Path
from weakref import WeakValueDictionary

import fsspec
import numpy as np
import pytest

from moma.data.remote import reading
from moma.data.remote.manifest import object_name
from moma.data.remote.reading import Link, OpenFiles, RemoteFiles, index_bytes, load_index
from moma.data.remote.storage import Storage
from moma.errors import StorageError, UserError
from tests.data.encode.encoding import encode_source
from tests.data.test_mapped_files import FILES, VOCABULARY, WORDS, expected_ids

ADDRESS = "ram://bucket/words"


@pytest.fixture(scope="module")
def checksums(tmp_path_factory):
    """Size and checksum of each file at the address, by name."""
    folder = tmp_path_factory.mktemp("made") / "shards/words"
    encode = lambda texts: [[100 + int(text)] * (int(text) + 1) for text in texts]  # noqa: E731
    info = encode_source(WORDS, encode, None, VOCABULARY, 0, folder, shard_tokens=1)
    found = {name: value for part in info.parts for name, value in part.checksums.items()}
    for name, value in found.items():
        content = (folder / name).read_bytes()
        path = f"{ADDRESS}/{object_name('made', name, value)}"
        fsspec.filesystem("ram").pipe_file(path, content)
    return found


def number_of_open_files(folder):
    """How many files in a folder this process has open."""
    opened = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(path.resolve().is_relative_to(folder) for path in opened)


def cached_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.arrow"))


class Processes:
    """Readers of different processes; each process has those of some sources."""

    def __init__(self, data, link, checksums, processes, sources, **options):
        self._shards, self._names = data / "shards", sorted(checksums)
        self._shards.mkdir(parents=True)
        (data / "cache").mkdir()
        self.readers = []
        for _ in range(processes):
            opened: OpenFiles = WeakValueDictionary()
            self.readers += [
                RemoteFiles(self._shards / f"{n}", link, checksums, open_files=opened, **options)
                for n in range(sources)
            ]

    def read(self, reader, number):
        return reader.get(self._shards / "0" / self._names[number]).ids(0).tolist()


def make_link(cache_bytes):
    return Link(address=ADDRESS, folder="made", cache_bytes=cache_bytes)


@pytest.mark.parametrize("processes", [8, 60])
def test_processes_read_at_random_through_a_small_cache(checksums, tmp_path, capsys, processes):
    cache_bytes = sum(size for size, _ in checksums.values()) * 3 // 4
    all_of = Processes(tmp_path, make_link(cache_bytes), checksums, processes, sources=3)
    draw = random.Random(0)
    for _ in range(10):
        for reader in all_of.readers:
            number = draw.randrange(FILES)
            assert all_of.read(reader, number) == expected_ids(number)
    # Each process keeps a file open at least, which is more than the cache holds with 60.
    warned = "exceeds data.cache_bytes" in capsys.readouterr().err
    assert warned == (processes == 60)
    assert warned or cached_bytes(tmp_path) <= cache_bytes


def test_sources_of_a_process_share_a_bound(checksums, tmp_path):
    cache_bytes = sum(size for size, _ in checksums.values()) * 4  # a quarter may be open
    process = Processes(tmp_path, make_link(cache_bytes), checksums, 1, sources=3)
    for number in np.random.default_rng(0).permutation(FILES).tolist():
        for reader in process.readers:
            assert process.read(reader, number) == expected_ids(number)
    assert 2 < number_of_open_files(tmp_path) <= FILES // 4 + 1


def test_a_file_larger_than_the_cache_is_refused(checksums, tmp_path):
    with pytest.raises(UserError, match=r"words: files of .* data\.cache_bytes = 100; incr"):
        RemoteFiles(tmp_path / "shards/words", make_link(100), checksums)


def test_a_failed_download_is_tried_again(checksums, tmp_path, monkeypatch, capsys):
    download, failures = Storage.download, [1, 2, 3]

    def fail_first(self, *args):
        if failures:
            raise StorageError(f"no network {failures.pop(0)}")
        download(self, *args)

    monkeypatch.setattr(Storage, "download", fail_first)
    process = Processes(tmp_path, make_link(10**6), checksums, 1, sources=1, pauses=(0, 0))
    (reader,) = process.readers
    with pytest.raises(StorageError, match="no network 3"):
        process.read(reader, 5)
    assert capsys.readouterr().err == "".join(
        f"moma: no network {number} (trying again in 0 s)\n" for number in (1, 2)
    )
    assert process.read(reader, 5) == expected_ids(5)


def test_pauses_between_downloads_are_42_seconds_in_all(checksums, tmp_path, monkeypatch):
    """As docs/failures.md says."""

    def fail(self, *args):
        raise StorageError("no network")

    pauses: list[float] = []
    monkeypatch.setattr(Storage, "download", fail)
    monkeypatch.setattr(reading.time, "sleep", pauses.append)
    files = RemoteFiles(tmp_path / "shards/0", make_link(10**6), checksums)
    with pytest.raises(StorageError, match="no network"):
        files.get(tmp_path / "shards/0" / next(iter(checksums)))
    assert sum(pauses) == 42


def test_an_index_is_mapped_from_its_file(tmp_path):
    path = tmp_path / "train.npy"
    for documents in (5, 0):
        path.write_bytes(index_bytes(np.arange(documents), np.zeros(documents)))
        found = load_index(path, path)
        assert found.tolist() == [[*range(documents)], [0] * documents]
        assert isinstance(found, np.memmap)


@pytest.mark.parametrize("content", [b"", b"no array" * 9, index_bytes(*np.eye(2))[:-1]])
def test_a_damaged_index_is_named(tmp_path, content):
    path = tmp_path / "train.npy"
    path.write_bytes(content)
    for file in (path, BytesIO(content)):
        with pytest.raises(UserError, match=r"train\.npy: damaged \(trunc.*array\); remove"):
            load_index(file, path)
