"""What is fetched into a data folder, and what of it is replaced."""

import json

import fsspec
import pytest

from moma.data.encode.prepare import prepare
from moma.data.encode.upload import SourceUpload
from moma.data.remote.fetching import provide_data
from moma.data.remote.reading import LINK_FILE
from moma.errors import UserError
from tests.data.encode.test_prepare import make_recipe
from tests.data.remote.test_training import CPU, memory, with_data


@pytest.fixture(scope="module")
def prepared(tiny, tmp_path_factory):
    """A recipe with rejected documents, prepared at an address."""
    path = tmp_path_factory.mktemp("rejected")
    memory().clear()
    recipe = make_recipe(path, 50, max_rejected=0.08)
    recipe = with_data(recipe, part_bytes=2000, tokenizers=tiny.data.path)
    recipe = with_data(recipe, path=path / "one", remote="ram://bucket/rejected")
    prepare(recipe, CPU, quiet=True)
    assert (path / "one/rejected.jsonl").read_bytes()
    return recipe


def test_preparing_what_was_fetched_keeps_rejected_documents(prepared, tmp_path, monkeypatch):
    fetched = with_data(prepared, path=tmp_path / "two")
    before = {name: file.getvalue() for name, file in memory().items()}
    provide_data(fetched.data)
    monkeypatch.setattr(SourceUpload, "upload", None)  # nothing is encoded again
    prepare(fetched, CPU, quiet=True, verify=True)
    rejected = (prepared.data.path / "rejected.jsonl").read_bytes()
    assert (tmp_path / "two/rejected.jsonl").read_bytes() == rejected
    assert {name: file.getvalue() for name, file in memory().items()} == before


def test_shards_without_their_rejected_documents_are_not_published(prepared, tmp_path):
    fetched = with_data(prepared, path=tmp_path / "two")
    provide_data(fetched.data)
    (tmp_path / "two/shards/captions/rejected.jsonl").unlink()
    with pytest.raises(UserError, match=r"rejected\.jsonl: missing; run `moma prepare --verify`"):
        prepare(fetched, CPU, quiet=True)


def test_a_folder_keeps_its_shards(prepared, tmp_path):
    fetched = with_data(prepared, path=tmp_path / "two")
    provide_data(fetched.data)
    folder = tmp_path / "two/shards/captions"
    files = {path: path.read_bytes() for path in folder.iterdir()}
    (name,) = [name for name in memory() if name.endswith("sources/captions.json")]
    content = memory()[name].getvalue()
    system = fsspec.filesystem("ram")
    system.pipe_file(name, content.replace(b'"documents": ', b'"documents": 1'))
    try:
        provide_data(fetched.data)
        with pytest.raises(UserError, match=r"captions: has other shards .*another data\.path"):
            provide_data(fetched.data, refresh=True)
    finally:
        system.pipe_file(name, content)
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_fetching_again_keeps_files_of_the_user(prepared, tmp_path):
    """Of a folder whose shards are not complete."""
    fetched = with_data(prepared, path=tmp_path / "two")
    provide_data(fetched.data)
    folder = tmp_path / "two/shards/captions"
    (folder / "notes.txt").write_text("mine")
    link = json.loads((folder / LINK_FILE).read_text())
    (folder / LINK_FILE).write_text(json.dumps(link | {"manifest": None}))
    with pytest.raises(UserError, match=r"'notes\.txt' there; move it away"):
        provide_data(fetched.data)
    (folder / "notes.txt").unlink()
    (folder.parent / ".fetching/old").mkdir(parents=True)  # of a killed process
    provide_data(fetched.data)
    assert {path.name for path in folder.parent.iterdir()} == {"captions", "text"}
