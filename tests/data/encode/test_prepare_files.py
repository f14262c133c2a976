"""`moma prepare` and the files of its folder: the user's, damaged ones, and another process."""

import errno
import json
from contextlib import nullcontext
from functools import partial
from itertools import count

import pytest

from moma.data.batches.iterator import Batches
from moma.data.encode import part_writer, parts
from moma.data.encode import prepare as prepare_module
from moma.data.sources.text import TextConfig
from moma.errors import UserError
from moma.files import lock_folder, sync_file
from tests.data.encode.preparing import contents, make_recipe, run


@pytest.fixture
def made(tiny, tmp_path):
    """`make_recipe` with tokenizers that exist: to train some would take most of the time."""
    return partial(make_recipe, tmp_path, 50, tokenizers=str(tiny.data.path))


def test_data_of_another_codec_is_refused_when_it_is_read(tmp_path, made):
    recipe = made()
    vocabulary = run(recipe).vocabulary
    Batches(recipe.data, vocabulary, seed=0)
    manifest = tmp_path / "data/provenance.json"
    values = json.loads(manifest.read_text())
    values["encoders"] = {"tokenizer": "x", "codec": "y"}
    manifest.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"encoded with another tokenizer .*, codec \(\w+ and y\)"):
        Batches(recipe.data, vocabulary, seed=0)


def test_a_folder_is_prepared_by_one_process_at_a_time(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, 2)
    monkeypatch.setattr(prepare_module, "LOCK_TIMEOUT", 0.0)
    (tmp_path / "data").mkdir()
    with (
        lock_folder(tmp_path / "data", 0),
        pytest.raises(UserError, match="in use by another process"),
    ):
        run(recipe)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_damaged_manifest_is_reported(tmp_path, made):
    recipe = made()
    run(recipe)
    for broken in ("", "[1, 2]", "3"):
        (tmp_path / "data/provenance.json").write_text(broken)
        with pytest.raises(UserError, match=r"provenance\.json: damaged"):
            run(recipe)


def test_a_full_disk_names_the_folder_and_loses_no_part(tmp_path, made, monkeypatch):
    cut = partial(made, part_bytes=20 * 2**17)
    run(cut(data="undisturbed"), processes=1)
    recipe, calls = cut(data="data"), count()

    def full(file):
        if next(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync_file(file)

    with monkeypatch.context() as patch:
        patch.setattr(part_writer, "sync_file", full)
        with pytest.raises(OSError, match=r"No space left on device.*captions\.partial"):
            run(recipe, processes=1)
    kept = "train-00000-00000.arrow"
    written = (tmp_path / "data/shards/captions.partial" / kept).stat().st_mtime_ns
    run(recipe, processes=1)
    assert contents(tmp_path / "data/shards") == contents(tmp_path / "undisturbed/shards")
    assert (tmp_path / "data/shards/captions" / kept).stat().st_mtime_ns == written


@pytest.mark.parametrize("complete", [False, True])
def test_a_damaged_file_is_made_again(tmp_path, made, monkeypatch, complete):
    """A byte differs, which opening the file does not show."""
    cut = partial(made, part_bytes=10 * 2**17, shard_tokens=100)
    run(cut(data="undisturbed"))
    recipe = cut(data="data")
    with monkeypatch.context() as patch:
        if not complete:
            patch.setattr(parts.PartialShards, "finish", stop)
        with pytest.raises(KeyboardInterrupt) if not complete else nullcontext():
            run(recipe)
    files = sorted((tmp_path / "data/shards").glob("captions*/train-*.arrow"))
    assert len(files) > 8
    kept = {path.name: path.stat().st_mtime_ns for path in files}
    (path,) = (path for path in files if path.name == "train-00002-00000.arrow")
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    run(recipe, verify=True)
    assert contents(tmp_path / "data/shards") == contents(tmp_path / "undisturbed/shards")
    made = {
        path.name
        for path in (tmp_path / "data/shards/captions").glob("train-*.arrow")
        if path.stat().st_mtime_ns != kept[path.name]
    }
    assert made == {path.name for path in files if path.name.startswith("train-00002-")}


def stop(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["shards/mine.txt", "tokenizer.json", "provenance.json"])
def test_files_of_the_user_are_not_overwritten(tmp_path, name):
    recipe = make_recipe(tmp_path, 50)
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=f"{name.split('/')[0]}.*data.path="):
        run(recipe)
    assert contents(tmp_path / "data") == {name: b"mine"}


def test_a_file_of_the_user_among_shards_is_not_deleted(tmp_path, made):
    recipe = made()
    run(recipe)
    mine = tmp_path / "data/shards/text/mine.txt"
    mine.write_text("mine")
    (tmp_path / "words.txt").write_text("other words\n\n" * 20)
    with pytest.raises(UserError, match=r"shards/text: .*did not write 'mine\.txt'"):
        run(recipe)
    assert mine.read_text() == "mine"


def test_a_changed_tokenizer_is_refused(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    run(recipe)
    with (tmp_path / "data/tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"tokenizer\.json: changed after"):
        run(recipe)


def test_a_source_folder_that_contains_the_data_folder_reads_no_output(tmp_path):
    recipe = make_recipe(tmp_path, 50)
    source = TextConfig(path=tmp_path / "**/*.jsonl", text_key="caption")
    data = recipe.data.model_copy(update={"sources": (source,), "image_share": 0})
    recipe = recipe.model_copy(update={"data": data})
    first = run(recipe).summary()
    (tmp_path / "data/codec_training").mkdir()
    (tmp_path / "data/codec_training/metrics.jsonl").write_text("no JSON\n")
    assert (tmp_path / "data/rejected.jsonl").exists()
    assert run(recipe).summary() == first
