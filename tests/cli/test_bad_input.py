"""Messages of the verbs about bad input, and the files that remain."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moma.demo.drawings import drawings
from tests.command_line import (
    complete_shards,
    make_input,
    moma,
    read_rows,
    refuses,
    succeeds,
    write_rows,
)


def cut_image(folder: Path) -> None:
    path = folder / "images" / "7.png"
    path.write_bytes(path.read_bytes()[:50])


def write_bad_row(row: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        rows = [json.dumps(row) for row in read_rows(folder)]
        text = "\n".join([*rows[:4], row, *rows[5:]]) + "\n"
        (folder / "images" / "captions.jsonl").write_text(text)

    return write


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "words.txt").unlink(), ["words.txt", "cannot read"]),
        (lambda folder: shutil.rmtree(folder / "images"), ["images: cannot read", "path"]),
    ],
)
def test_unreadable_sources_are_named_and_leave_no_shards(tmp_path, spoil, named):
    recipe = make_input(tmp_path)
    spoil(tmp_path)
    message = refuses("prepare", recipe)
    assert all(part in message for part in named), message
    assert not complete_shards(tmp_path)
    assert not (tmp_path / "data" / "codec").exists()
    assert "moma prepare" in refuses("train", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            lambda folder: (folder / "images" / "7.png").unlink(),
            ["row 8", "there is no", "7.png"],
        ),
        (cut_image, ["row 8", "7.png"]),
        (write_bad_row('{"image": "4.png"'), ["captions.jsonl, row 5", "not valid JSON", "fix"]),
    ],
)
def test_too_many_rejected_documents_leave_no_complete_shards(tmp_path, spoil, named):
    """Other rejected rows are in the tests of each kind of source."""
    recipe = make_input(tmp_path)
    spoil(tmp_path)
    message = refuses("prepare", recipe)
    assert all(part in message for part in [*named, "1 of 12 documents", "max_rejected"]), message
    (line,) = (tmp_path / "data/rejected.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"source", "row", "reason"}
    assert not complete_shards(tmp_path)
    assert "moma prepare" in refuses("train", recipe)
    # With a higher limit the same rows are rejected and the rest is encoded.
    result = json.loads(succeeds("prepare", recipe, "data.max_rejected=0.1", "--json"))
    assert result["sources"]["captions"]["documents"] == 11
    assert result["rejected"] == result["sources"]["captions"]["rejected"] == 1
    assert (tmp_path / "data/rejected.jsonl").read_text().splitlines() == [line]


def test_where_most_rows_are_rejected_the_cause_is_named(tmp_path):
    recipe = make_input(tmp_path)
    for path in tmp_path.glob("images/*.png"):
        path.rename(path.with_suffix(".gif"))
    write_rows(tmp_path, [{"image": "0.gif"}, *read_rows(tmp_path)])
    message = refuses("prepare", recipe)
    assert "13 of 13 documents" in message and "the most frequent reason, of 12: " in message
    assert "there is no" in message and "0.png" in message
    assert "fix the cause" in message and "or raise" not in message


def test_prepare_refuses_padding_as_train_does(trained, tmp_path):
    recipe = make_input(tmp_path)
    source = f'{{kind="captions", path="{tmp_path}/images"}}'
    tokenizers = f"data.tokenizers={trained}/data"  # so that none are trained
    changes = (f"data.sources=[{source}]", "data.image_share=0.5", tokenizers)
    message = refuses("prepare", recipe, *changes)
    assert message.startswith(f"{tmp_path}/data: is prepared, but cannot be trained on")
    cause = message.partition("with this recipe: ")[2]
    assert "data.max_padding allows 0.50%" in cause and refuses("train", recipe, *changes) == cause
    summary = json.loads(succeeds("prepare", recipe, *changes, "data.max_padding=1", "--json"))
    assert summary["documents"] == 12


def test_text_that_is_not_utf8_is_refused(tmp_path):
    recipe = make_input(tmp_path)
    (tmp_path / "words.txt").write_bytes(b"a\n\xff")
    message = refuses("prepare", recipe)
    assert all(part in message for part in ("'text'", "words.txt, row", "UTF-8")), message


def test_a_fixed_folder_is_prepared_by_the_same_command(tmp_path):
    recipe = make_input(tmp_path)
    image = tmp_path / "images" / "7.png"
    whole = image.read_bytes()
    image.unlink()
    refuses("prepare", recipe)
    image.write_bytes(whole)
    succeeds("prepare", recipe)
    assert complete_shards(tmp_path) == {"captions", "text"}


def test_failed_preparation_keeps_the_old_shards(trained, tmp_path):
    recipe = make_input(tmp_path)
    tokenizers = f"data.tokenizers={trained}/data"  # so that none are trained
    succeeds("prepare", recipe, tokenizers)
    # An image is missing now, and the list has changed, so the old shards are outdated.
    write_rows(tmp_path, [{"image": "gone.png", "caption": "box"}, *read_rows(tmp_path)])
    before = (tmp_path / "data/shards/captions/shard.json").read_text()
    assert "gone.png" in refuses("prepare", recipe, tokenizers)
    assert (tmp_path / "data/shards/captions/shard.json").read_text() == before
    assert not list((tmp_path / "data").rglob("*.partial/shard.json"))


def test_a_source_without_documents_is_refused_by_prepare_and_train(tmp_path):
    recipe = make_input(tmp_path)
    (tmp_path / "words.txt").write_text("")
    message = refuses("prepare", recipe)
    assert f"source 'text': there are no documents in {tmp_path}/words.txt" in message
    assert not complete_shards(tmp_path)
    assert "not prepared yet" in refuses("train", recipe)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_preparing_succeeds_after_a_refused_recipe(tmp_path):
    recipe = make_input(tmp_path)
    assert "at least 325" in refuses("prepare", recipe, "codec.codebook_size=64")
    succeeds("prepare", recipe)


def test_another_codec_is_refused_for_prepared_data(trained):
    before = (trained / "data" / "provenance.json").read_text()
    message = refuses("prepare", trained / "recipe.toml", "codec.codebook_size=32")
    assert f"{trained}/data" in message and "data.path=" in message
    assert (trained / "data" / "provenance.json").read_text() == before


def test_a_loaded_codec_keeps_its_image_size(trained, tmp_path):
    succeeds(
        "prepare",
        trained / "recipe.toml",
        f"data.tokenizers={trained}/data",
        f"data.path={tmp_path}/data",
        "codec.image_size=64",
    )
    assert json.loads((tmp_path / "data/vocabulary.json").read_text())["codes_per_image"] == 16


def test_tokenizers_can_come_from_a_prepared_folder(trained, tmp_path):
    succeeds(
        "prepare",
        trained / "recipe.toml",
        f"data.tokenizers={trained}/data",
        f"data.path={tmp_path}/data",
    )
    for name in ("tokenizer.json", "vocabulary.json", "codec/model.safetensors"):
        assert (tmp_path / "data" / name).read_bytes() == (trained / "data" / name).read_bytes()


def test_an_unfinished_copy_of_tokenizers_is_completed(trained, tmp_path):
    half = tmp_path / "data"
    changes = (f"data.tokenizers={trained}/data", f"data.path={half}", "seed=9")
    succeeds("prepare", trained / "recipe.toml", *changes)
    # As after a kill: the vocabulary is the last file that is copied.
    (half / "vocabulary.json").unlink()
    shutil.rmtree(half / "codec")
    succeeds("prepare", trained / "recipe.toml", *changes)
    weights = "codec/model.safetensors"
    assert (half / weights).read_bytes() == (trained / "data" / weights).read_bytes()


@pytest.mark.parametrize("verb", ["prepare", "train"])
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("pretrain.stepps=3", ["'pretrain.stepps'", "did you mean 'steps'", "checkpoint_every"]),
        ("data.sources.0.pth=a", ["pth", "did you mean 'path'", "caption_first"]),
        ("pretrain.steps=0", ["'pretrain.steps'", "greater than or equal to 1"]),
        ("pretrain.steps", ["'pretrain.steps'", "key=value"]),
        ("stage=aux_router", ["from=RUN"]),
    ],
)
def test_a_wrong_key_is_reported_before_anything_is_written(tmp_path, verb, override, named):
    recipe = make_input(tmp_path)
    message = refuses(verb, recipe, override)
    assert all(part in message for part in named), message
    assert not (tmp_path / "data").exists() and not (tmp_path / "run").exists()


def test_a_missing_recipe_is_named(tmp_path):
    assert f"{tmp_path}/no.toml: cannot read" in refuses("train", tmp_path / "no.toml")


@pytest.mark.parametrize("content", ["{}", '{"image_codes": []}', "words"])
def test_a_vocabulary_of_the_users_is_in_the_way(tmp_path, content):
    recipe = make_input(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vocabulary.json").write_text(content)
    message = refuses("prepare", recipe)
    assert "data: has vocabulary.json, but no provenance.json" in message
    assert (tmp_path / "data" / "vocabulary.json").read_text() == content


def test_training_requires_prepared_data(tmp_path):
    recipe = make_input(tmp_path)
    assert "run `moma prepare`" in refuses("train", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.groups=moe_zz"], "moe_zz"),
        (["model.groups=moe_0t2i"], "moe_0t2i"),
        ([f"model.{key}={2**20}" for key in ("dim", "hidden")], "parameters do not fit into"),
        (["data.image_share=0.49"], "0.49"),
        (["stage=aux_router", "from={folder}/empty"], "no checkpoint"),
    ],
)
def test_a_recipe_that_cannot_train_leaves_no_run(trained, tmp_path, overrides, named):
    shutil.copytree(trained / "run", tmp_path / "empty", ignore=shutil.ignore_patterns("check*"))
    run = tmp_path / "new"
    changes = [override.format(folder=tmp_path) for override in overrides]
    assert named in refuses("train", trained / "recipe.toml", *changes, f"run={run}")
    assert not run.exists()


def test_a_run_of_another_recipe_is_not_changed(trained):
    before = (trained / "run" / "recipe.toml").read_text()
    message = refuses("train", trained / "recipe.toml", "seed=4")
    assert f"{trained}/run" in message and "seed: 3 → 4" in message and "run=" in message
    assert (trained / "run" / "recipe.toml").read_text() == before


def test_a_run_in_the_folder_of_the_data_is_refused(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    data = f"data.path={tmp_path}/data"
    assert "run=" in refuses("train", trained / "recipe.toml", data, f"run={tmp_path}/data")


def test_routers_need_the_model_of_their_run(trained, tmp_path):
    changes = ["stage=aux_router", f"from={trained}/run", f"run={tmp_path}/new"]
    message = refuses("train", trained / "recipe.toml", *changes, "model.layers=1")
    assert "another [model]" in message and "layers: 2 → 1" in message
    assert not (tmp_path / "new").exists()


def test_without_data_packages_the_demo_names_what_to_install(tmp_path, monkeypatch):
    drawings.cache_clear()
    monkeypatch.setitem(sys.modules, "emoji", None)
    message = refuses("demo", "--out", tmp_path / "demo")
    assert message.startswith("the package 'emoji'") and "pip install 'moma[demo]'" in message
    assert not list(tmp_path.rglob("shard.json")) and not list(tmp_path.rglob("report.html"))


def test_an_interruption_message_explains_how_to_continue(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("moma.recipe.read_recipe", interrupt)
    outcome = moma("prepare", make_input(tmp_path))
    assert outcome.code == 130
    assert "the same command continues" in outcome.err


def test_paths_refused_by_the_system_give_one_message(trained, tmp_path):
    recipe = trained / "recipe.toml"
    for path in ("/proc/x", f"{tmp_path}/{'x' * 300}"):
        message = refuses("prepare", recipe, f"data.path={path}")
        assert path in message and message.endswith("; choose another path")
