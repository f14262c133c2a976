"""`moma data inspect ADDRESS`: the same as of a folder, without downloading what is not shown."""

import json

import fsspec
import pytest

from moma.data.encode.existing import fetch_existing
from moma.data.encode.prepare import prepare
from moma.data.encode.upload import SourceUpload
from moma.data.inspect import decode_document, inspect
from moma.data.remote.storage import Storage
from moma.errors import UserError
from tests.command_line import refuses, succeeds
from tests.data.remote.test_training import ADDRESS, CPU, at, memory


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """A recipe that is prepared at a folder with the scheme `file`, and in a data folder."""
    folder = tmp_path_factory.mktemp("existing")
    recipe = at(tiny, folder / "data", f"file://{folder}/remote", tokenizers=tiny.data.path)
    prepare(recipe, CPU, quiet=True)
    # What a killed process may leave, and a person.
    for name in (".0123456789abcdef.writing", ".DS_Store", "notes.txt"):
        (folder / "remote/sources" / name).touch()
    return recipe


@pytest.fixture
def downloaded(monkeypatch):
    """Names of the objects that are downloaded."""
    names: list[str] = []
    download = Storage.download

    def note(self, name, expected, file):
        names.append(name)
        download(self, name, expected, file)

    monkeypatch.setattr(Storage, "download", note)
    return names


def test_an_address_is_described_as_a_folder(prepared, tmp_path, downloaded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = json.loads(succeeds("data", "inspect", prepared.data.remote, "--json"))
    assert shown["path"] == prepared.data.remote
    expected = json.loads(succeeds("data", "inspect", prepared.data.path, "--json"))
    for of_place in ("path", "figure"):
        del shown[of_place], expected[of_place]
    assert shown == expected
    assert (tmp_path / "inspect/lengths.png").exists()
    assert not [name for name in downloaded if name.endswith(".arrow") or "codec" in name]
    downloaded.clear()
    one = ("--source", "captions", "--document", "2", "--json")
    shown = json.loads(succeeds("data", "inspect", prepared.data.remote, *one))
    expected = json.loads(succeeds("data", "inspect", prepared.data.path, *one))
    assert [part["type"] for part in shown["segments"]].count("image") == 1
    assert [part.get("text") for part in shown["segments"]] == [
        part.get("text") for part in expected["segments"]
    ]
    assert len([name for name in downloaded if name.endswith(".arrow")]) == 1


def test_what_exists_of_an_unfinished_source_is_described(tiny, tmp_path, downloaded, monkeypatch):
    memory().clear()
    upload = SourceUpload.upload
    documents: list[int] = []

    def upload_some(self, folder, record):
        if len(documents) == 5:
            raise KeyboardInterrupt
        upload(self, folder, record)
        documents.append(record.total.documents)

    recipe = at(tiny, tmp_path / "data", tokenizers=tiny.data.path)
    with pytest.raises(UserError, match=rf"{ADDRESS}: has no tokenizers yet; run `moma prepare`"):
        fetch_existing(ADDRESS, tmp_path / "nothing", None, decodes=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SourceUpload, "upload", upload_some)
        prepare(recipe, CPU, quiet=True, processes=1)
    # Files of other keys, which are fewer.
    fsspec.filesystem("ram").pipe_file(f"{ADDRESS}/shards/captions/old/part-00000.json", b"{}")
    downloaded.clear()
    fetch_existing(ADDRESS, tmp_path / "found", None, decodes=True)
    found = inspect(tmp_path / "found", None, tmp_path / "out")
    assert found["documents"] == sum(documents) == sum(found["lengths"]["documents"])
    assert found["sources"].keys() == {"captions"}
    assert not [name for name in downloaded if name.endswith(".arrow")]
    document = decode_document(tmp_path / "found", "captions", "train", 1, tmp_path / "out")
    prepare(recipe, CPU, quiet=True)
    after = decode_document(recipe.data.path, "captions", "train", 1, tmp_path / "out")
    assert document == after


def test_nothing_at_an_address_is_named(prepared, tmp_path):
    assert "--source words: file://" in refuses(
        "data", "inspect", prepared.data.remote, "--source", "words"
    )
    assert "has no tokenizers yet" in refuses("data", "inspect", f"file://{tmp_path}/none")
    assert "FOLDER: contains credentials" in refuses("data", "inspect", "s3://key:secret@a/b")
