"""A folder of another kind than a verb wants is described, and the right one is named."""

import shutil

import pytest

from tests.command_line import refuses, succeeds

RUN_VERBS = [
    ["evaluate", "{folder}"],
    ["generate", "{folder}", "--prompt", "a"],
    ["inspect", "{folder}", "--prompt", "a"],
    ["report", "{folder}"],
    ["replay", "{folder}"],
    ["export", "{folder}", "{out}"],
    ["train", "{recipe}", "stage=aux_router", "from={folder}", "run={out}"],
]
DATA_VERBS = [
    ["data", "inspect", "{folder}"],
    ["data", "inspect", "{folder}", "--source", "text", "--document", "1"],
    ["evaluate", "{run}", "--data", "{folder}"],
]
TOKENIZER_VERBS = [
    ["tokenizer", "show", "{folder}", "--text", "a"],
    ["tokenizer", "show", "{folder}", "--image", "{image}"],
    ["prepare", "{recipe}", "data.tokenizers={folder}", "data.path={out}"],
]


@pytest.fixture
def refused(trained, tmp_path, monkeypatch):
    """Call a verb with a folder; returns the message."""
    monkeypatch.chdir(tmp_path)
    fill = {"run": trained / "run", "recipe": trained / "recipe.toml"}
    fill |= {"image": trained / "images/0.png", "out": tmp_path / "out"}

    def call(words, folder):
        message = refuses(*(word.format(folder=folder, **fill) for word in words))
        assert {path.name for path in tmp_path.glob("out/*")} <= {"provenance.json"}
        assert message.count(str(folder)) <= 2
        return message

    return call


@pytest.mark.parametrize("verb", RUN_VERBS, ids=" ".join)
def test_verbs_that_want_a_run(trained, tmp_path, refused, verb):
    data, recipe = trained / "data", trained / "recipe.toml"
    assert f"{data}: is a data folder, not a run folder" in refused(verb, data)
    assert f"this recipe's run folder is {trained}/run" in refused(verb, recipe)
    assert f"{trained}: not a run folder (no run.json); {trained}/run is one" in refused(
        verb, trained
    )
    checkpoint = trained / "run/checkpoints"
    assert f"{trained}/run is one" in refused(verb, checkpoint)
    assert "none: there is no such folder" in refused(verb, tmp_path / "none")
    assert "images: not a run folder" in refused(verb, trained / "images")


@pytest.mark.parametrize("verb", DATA_VERBS, ids=" ".join)
def test_verbs_that_want_prepared_data(trained, tmp_path, refused, verb):
    run, recipe = trained / "run", trained / "recipe.toml"
    message = refused(verb, run)
    assert (
        f"{run}: is a run folder, not a data folder; its data folder is {trained}/data" in message
    )
    assert f"this recipe's data folder is {trained}/data" in refused(verb, recipe)
    assert f"{trained}/data is one" in refused(verb, trained)
    assert f"{trained}/data is one" in refused(verb, trained / "data/shards/text")
    assert "none: there is no such folder" in refused(verb, tmp_path / "none")
    assert "images: not a data folder" in refused(verb, trained / "images")


@pytest.mark.parametrize("verb", TOKENIZER_VERBS, ids=" ".join)
def test_verbs_that_want_tokenizers(trained, tmp_path, refused, verb):
    for folder in (trained / "images", tmp_path / "none", trained / "recipe.toml"):
        message = refused(verb, folder)
        assert f"{folder}: there are no tokenizers; name a run, prepared data or" in message


def test_data_of_other_sources_is_not_a_run_s_data(trained, tmp_path):
    other = tmp_path / "other"
    changes = [
        "data.sources.0.name=others",
        f"data.path={other}",
        f"data.tokenizers={trained}/data",
    ]
    succeeds("prepare", trained / "recipe.toml", *changes)
    message = refuses("evaluate", trained / "run", "--data", other)
    assert f"{other}: is not the data that {trained}/run was trained on" in message


def test_a_data_folder_that_has_moved_can_be_named(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "moved")
    succeeds("evaluate", trained / "run", "--data", tmp_path / "moved")
