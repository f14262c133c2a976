"""Devices, pipes and files without end are refused by everything that reads files."""

import os
import shutil

import pytest

from moma.data.documents import Document, ImageRef, Rejected
from moma.data.sources.dataset import DatasetConfig
from moma.data.sources.folder import FolderConfig
from moma.data.sources.html import HtmlConfig
from moma.errors import UserError
from moma.files import read_bounded
from moma.hub.chameleon_codec import load_chameleon_codec
from moma.images import image_size
from moma.runtime.weights import open_weights, read_tensors
from moma.tokenizers.text import load_text_tokenizer
from moma.vocabulary import Vocabulary
from tests.command_line import make_input, refuses


@pytest.fixture(params=["device", "pipe"])
def endless(request, tmp_path):
    """Make a path a device or a pipe without a writer."""

    def make(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
        return path

    return make


@pytest.mark.parametrize(
    "call",
    [
        ["tokenizer", "train-text", "{path}"],
        ["tokenizer", "train-text", "{path}.toml"],
        ["train", "{path}"],
        ["plan", "{path}"],
        ["bench", "data", "{path}"],
        ["evaluate", "{path}"],
        ["data", "inspect", "{path}"],
        ["tokenizer", "show", "{path}", "--text", "a"],
        ["tokenizer", "show", "{path}", "--image", "a.png"],
        ["tokenizer", "import-chameleon", "{path}", "{path}"],
        ["import", "{path}", "{path}-run"],
        ["generate", "{run}", "--image", "{path}"],
        ["report", "{path}"],
        ["report", "{run}", "--out", "{path}"],
        ["evaluate", "{run}", "--data", "{path}"],
    ],
)
def test_verbs_refuse_special_files(trained, tmp_path, endless, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = endless("endless")
    endless("endless.toml")
    message = refuses(*(word.format(path=path, run=trained / "run") for word in call))
    assert "endless" in message


@pytest.mark.parametrize("kind", ["text", "interleaved", "webdataset", "dataset"])
@pytest.mark.parametrize("name", ["endless", "endless.jsonl", "endless.parquet"])
def test_sources_refuse_special_files(tmp_path, endless, kind, name):
    recipe = make_input(tmp_path)
    source = f'data.sources.1={{kind="{kind}", path="{endless(name)}"}}'
    assert f"{name}: " in refuses("prepare", recipe, source)


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl", "metadata.csv"])
def test_captions_refuse_special_files(tmp_path, endless, name):
    recipe = make_input(tmp_path)
    (tmp_path / "images/captions.jsonl").unlink()
    endless(f"images/{name}")
    message = refuses("prepare", recipe)
    assert "captions.jsonl: cannot read it" in message


def test_members_of_folders_that_are_special_are_skipped(tmp_path, endless):
    for name in ("a.png", "a.txt", "b.html"):
        endless(name)
    (tmp_path / "c.html").write_text("<img src=a.png>text")
    (tmp_path / "c.txt").write_text("text")
    (page,) = HtmlConfig(path=tmp_path).documents()
    if isinstance(page, Document):  # the device is outside of the folder
        image = page.segments[0]
        with pytest.raises(UserError, match="not a regular file"):
            assert isinstance(image, ImageRef) and image.read()
    (rejected,) = FolderConfig(path=tmp_path).documents()
    assert isinstance(rejected, Rejected) and "no image beside it" in rejected.message
    assert image_size(tmp_path / "a.png") is None


def test_extended_recipes_and_run_manifests_may_not_be_special(tmp_path, endless, trained):
    endless("base.toml")
    (tmp_path / "mine.toml").write_text('extends = "base.toml"')
    assert "base.toml: cannot read the recipe" in refuses("plan", tmp_path / "mine.toml")
    endless("run/run.json")
    assert "not a run folder" in refuses("evaluate", tmp_path / "run")
    shutil.copytree(trained / "data", tmp_path / "data")
    endless("data/provenance.json")
    assert f"{tmp_path}/data" in refuses("data", "inspect", tmp_path / "data")


@pytest.mark.parametrize(
    "read",
    [
        load_text_tokenizer,
        Vocabulary.load,
        read_tensors,
        load_chameleon_codec,
        lambda path: read_tensors(path.with_suffix(".safetensors")),
        lambda path: open_weights(path.parent),
    ],
)
def test_readers_of_weights_and_vocabularies_refuse_special_files(endless, read):
    endless("model.safetensors")
    file = endless("model.bin")
    with pytest.raises(UserError, match="model") as caught:
        read(file)
    assert str(caught.value).count(str(file.parent)) == 1  # named once
    for path in file.parent.iterdir():
        path.unlink()
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(caught.value).count(str(file.parent)) == 1


def test_files_that_are_parsed_whole_are_bounded(tmp_path):
    path = tmp_path / "recipe.toml"
    path.touch()
    os.truncate(path, 2**40)  # takes no space on the disk
    assert "larger than 16 MiB" in refuses("plan", path)
    with pytest.raises(OSError, match="larger than 1 MiB"):
        read_bounded(path, 2**20)


def test_a_single_line_without_end_is_one_rejected_row(tmp_path):
    path = tmp_path / "words.txt"
    path.touch()
    os.truncate(path, 2**27)
    assert "longer than 64 MiB" in refuses("tokenizer", "train-text", path)
    config = DatasetConfig(path=str(path))
    (rejected,) = config.documents()
    assert isinstance(rejected, Rejected) and "longer than 64 MiB" in rejected.message
