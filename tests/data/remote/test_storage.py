"""Addresses and requests that fail: one message, which names the address and what to do."""

import errno
import sys
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from moma.data.remote.address import check_address
from moma.data.remote.storage import open_storage
from moma.errors import StorageError, UserError
from moma.recipe import check, read_recipe
from moma.train.recipe import Recipe
from tests.factories import values_of_recipe, write_minimal_recipe


@pytest.mark.parametrize("address", ["s3://bucket/a/b", "file:///data/a", "ram://a/b"])
def test_addresses(address):
    assert check_address(address) == check_address(address + "/") == address


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("data/my", "should be an address such as s3://"),
        ("simplecache::s3://bucket/a", "should be an address"),
        ("s3://", "should name a folder"),
        ("s3://bucket/../a", "without . or .."),
        ("s3://bucket\\a", r"one of \\"),
        ("s3://bucket/a[1]", "one of"),
        ("s3://bucket/*/a", "one of"),
        ("file://data/a", "absolute path"),
        ("local:///data/a", "begin with file:///"),
        ("https://host/a", r"https:// is no storage that keeps .*; use s3://"),
        ("http://host/a", "http:// is no storage that keeps"),
        ("github://a/b", "github:// is no storage that keeps"),
        ("zip://a/b", "zip:// is no storage that keeps"),
        ("memory://a/b", "memory:// is no storage that keeps what is written"),
        ("file://~/a", "absolute path"),
        ("s3://bucket/a\n", "cannot be printed"),
    ],
)
def test_other_addresses_are_refused(address, named):
    with pytest.raises(ValueError, match=named):
        check_address(address)


SECRETS = ["s3://key:SECRET@bucket/a", "s3://bucket/a?token=SECRET", "s3://SECRET@bucket/a"]


@pytest.mark.parametrize("address", SECRETS)
def test_credentials_in_an_address_are_refused_and_not_printed(address, tmp_path):
    values = values_of_recipe(tmp_path)
    values["data"]["remote"] = address
    with pytest.raises(UserError, match=r"data\.remote.*contains credentials") as refused:
        check(Recipe, values, "my.toml")
    assert "SECRET" not in str(refused.value)
    with pytest.raises(UserError, match="contains credentials") as refused:
        read_recipe(Recipe, write_minimal_recipe(tmp_path), [f"data.remote={address}"])
    assert "SECRET" not in str(refused.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    open_storage.cache_clear()
    with pytest.raises(UserError, match=r"s3://bucket/a: .*pip install 'moma\[s3\]'"):
        open_storage("s3://bucket/a")
    with pytest.raises(UserError, match="nowhere://a: unknown scheme 'nowhere'"):
        open_storage("nowhere://a")


def test_file_systems_that_cannot_be_opened():
    with pytest.raises(StorageError, match="ftp://localhost:1/a: cannot be read or written"):
        open_storage("ftp://localhost:1/a")
    with pytest.raises(UserError, match="asyncwrapper://a: such a file system needs more than"):
        open_storage("asyncwrapper://a")


class NoCredentialsError(Exception):
    """As botocore's."""


@pytest.mark.parametrize(
    ("error", "kind", "named"),
    [
        (FileNotFoundError("The specified bucket does not exist"), UserError, "create the bucket"),
        (PermissionError("Access Denied"), UserError, r"no permission \(Access Denied\)"),
        (NoCredentialsError("Unable to locate"), UserError, "give credentials in the environment"),
        (OSError(errno.EIO, "Could not connect"), StorageError, "check the network"),
        (TimeoutError(), StorageError, "no answer in time"),
        (OSError("to http://key:SECRET@host/a"), StorageError, r"\(to http://host/a\)"),
        (OSError("to https://host/a?X-Sig=SECRET now"), StorageError, r"\(to https://host/a now\)"),
        (RuntimeError("x" * 5000), StorageError, r"run the same command to resume"),
    ],
)
def test_a_failed_request_is_one_message(error, kind, named, monkeypatch):
    storage = open_storage("ram://bucket/a")

    def fail(*arguments, **options):
        raise error

    for call in ("pipe_file", "rm_file"):
        monkeypatch.setattr(fsspec.filesystem("ram"), call, fail, raising=False)
    requests = [lambda: storage.write("x", b""), lambda: storage.remove(["x"])]
    # Of another machine, it may be that it has removed the object.
    for request in requests[: 1 if isinstance(error, FileNotFoundError) else 2]:
        with pytest.raises(kind, match=rf"ram://bucket/a/x: .*{named}") as refused:
            request()
        assert type(refused.value) is kind
        assert len(str(refused.value)) < 1000


def storages(tmp_path):
    return [open_storage("ram://storage/a"), open_storage(f"file://{tmp_path}/a")]


def test_objects(tmp_path):
    for storage in storages(tmp_path):
        assert storage.read("x/y.json") is None and storage.sizes("x") == {}
        storage.write("x/y.json", b"1")
        storage.write("x/y.json", b"22")
        assert storage.read("x/y.json") == b"22"
        assert not storage.create("x/y.json", b"333") and storage.create("x/z", b"4")
        assert storage.sizes("x") == {"x/y.json": 2, "x/z": 1}
        assert storage.read_all(["x/y.json", "x/z"]) == {"x/y.json": b"22", "x/z": b"4"}
        assert storage.read_all(["x/z", "x/none"], missing_ok=True) == {"x/z": b"4"}
        with pytest.raises(UserError, match="x/none: not found"):
            storage.read_all(["x/z", "x/none"])
        (tmp_path / "local").write_bytes(b"content")
        storage.upload(tmp_path / "local", "x/content")
        storage.require({"x/content": 7}, ["x"])
        with pytest.raises(StorageError, match="x/content: missing, or not of 8 bytes"):
            storage.require({"x/content": 8}, ["x"])
        storage.remove(["x/z", "x/z"])
        assert storage.read("x/z") is None


def test_an_upload_that_arrives_cut_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "local").write_bytes(b"content")
    storage = open_storage("ram://storage/cut")
    memory = fsspec.filesystem("ram")
    monkeypatch.setattr(memory, "put_file", lambda source, path: memory.pipe_file(path, b"cont"))
    with pytest.raises(StorageError, match="x: has 4 bytes after 7 were written"):
        storage.upload(tmp_path / "local", "x")


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """They have the same folder, as machines have on a network file system."""
    storage, source = open_storage(f"file://{tmp_path}/shared"), tmp_path / "source"
    source.write_bytes(bytes(2**22))
    with ThreadPoolExecutor(8) as pool:
        created = [*pool.map(lambda n: storage.create("one", b"%d" % n), range(64))]
        written = [pool.submit(storage.upload, source, f"{n // 8}.bin") for n in range(64)]
        assert [future.result() for future in written] == [None] * 64
    assert sum(created) == 1 and storage.read("one") == b"%d" % created.index(True)
    expected = dict.fromkeys((f"{n}.bin" for n in range(8)), 2**22)
    assert {name: size for name, size in storage.sizes("").items() if name != "one"} == expected
