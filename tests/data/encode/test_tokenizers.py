"""Where a data folder's tokenizers come from, and which settings bind it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.runs import Tokenizers
from moma.tokenizers.folder import make_text_tokenizer, read_metrics
from moma.tokenizers.image.codec import ImageCodec
from moma.vocabulary import Vocabulary
from tests.data.encode.preparing import contents, make_recipe, run

ROWS = 50


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A prepared folder, to take tokenizers from."""
    folder = tmp_path_factory.mktemp("made")
    run(make_recipe(folder, ROWS, "taken"))
    return folder


def recipe_in(folder, data="data", **changes):
    """A recipe whose sources the module shares."""
    return make_recipe(folder, ROWS, data, **changes)


def with_changes(recipe, section, **changes):
    changed = getattr(recipe, section).model_copy(update=changes)
    return recipe.model_copy(update={section: changed})


def text_alone(recipe, **changes):
    sources = [source for source in recipe.data.sources if source.name == "text"]
    return with_changes(recipe, "data", sources=sources, image_share=0, **changes)


# Trained


def test_prepare_leaves_the_log_and_figures_of_its_codec(made):
    folder = Tokenizers(made / "taken")
    rows = [json.loads(line) for line in (folder.path / "codec_training/metrics.jsonl").open()]
    figures = read_metrics(folder).model_dump()
    assert rows[-1]["step"] == 4
    assert {key: rows[-1][key] for key in figures} == figures
    left = sorted(path.name for path in (folder.path / "codec_training").iterdir())
    assert left == ["metrics.jsonl", "samples"]


@pytest.mark.parametrize(
    ("section", "changes", "named"),
    [
        ("codec", {"dead_code_threshold": 0.5}, r"\(codec\.dead_code_threshold\)"),
        ("text_tokenizer", {"max_documents": 7}, r"\(text_tokenizer\.max_documents\)"),
        ("codec_training", {"steps": 5, "batch_size": 2}, r"\(codec_training\.steps, codec_tr"),
    ],
)
def test_settings_that_would_make_others_are_refused_by_name(made, section, changes, named):
    before = contents(made / "taken")
    with pytest.raises(UserError, match=named):
        run(with_changes(recipe_in(made, "taken"), section, **changes))
    assert contents(made / "taken") == before


def test_how_often_training_reports_is_not_compared(made):
    before = contents(made / "taken")
    changes = {"log_every": 1, "measure_every": 1, "save_every": 1}
    run(with_changes(recipe_in(made, "taken"), "codec_training", **changes))
    assert contents(made / "taken") == before


def test_another_seed_is_refused_by_name(made):
    with pytest.raises(UserError, match=r"\(seed\).*data\.path"):
        run(recipe_in(made, "taken").model_copy(update={"seed": 4}))


def test_settings_that_made_nothing_do_not_bind(tmp_path):
    recipe = recipe_in(tmp_path)
    with pytest.raises(UserError, match="at least"):
        run(with_changes(recipe, "codec", codebook_size=64))
    run(recipe)


# Taken


def test_settings_without_effect_are_not_compared(made, tmp_path):
    recipe = recipe_in(made, tokenizers=made / "taken", path=tmp_path / "data")
    prepared = run(recipe)
    other = with_changes(recipe, "codec", codebook_size=99, image_size=64)
    other = with_changes(other, "text_tokenizer", vocabulary_size=5000)
    other = with_changes(other, "codec_training", steps=9).model_copy(update={"seed": 9})
    before = contents(tmp_path / "data")
    assert run(other).vocabulary == prepared.vocabulary
    assert contents(tmp_path / "data") == before
    for name in ("tokenizer.json", "vocabulary.json", "codec/model.safetensors"):
        assert before[name] == (made / "taken" / name).read_bytes()


def test_the_same_tokenizers_elsewhere_are_the_same(made, tmp_path):
    shutil.copytree(made / "taken", tmp_path / "copy")
    recipe = recipe_in(made, tokenizers=tmp_path / "copy", path=tmp_path / "data")
    prepared = run(recipe)
    moved = with_changes(recipe, "data", tokenizers=made / "taken")
    assert run(moved).summary() == prepared.summary()
    # What was copied is needed no longer.
    shutil.rmtree(tmp_path / "copy")
    assert run(recipe).summary() == prepared.summary()


def test_other_tokenizers_are_refused(made, tmp_path):
    shutil.copytree(made / "taken", tmp_path / "copy")
    recipe = recipe_in(made, tokenizers=tmp_path / "copy", path=tmp_path / "data")
    run(recipe)
    with (tmp_path / "copy/codec/config.json").open("a") as file:
        file.write("\n")
    before = contents(tmp_path / "data")
    with pytest.raises(UserError, match=r"\(data\.tokenizers\.codec\)"):
        run(recipe)
    with pytest.raises(UserError, match=r"made with another configuration.*seed"):
        run(with_changes(recipe, "data", tokenizers=None))
    with pytest.raises(UserError, match=r"nowhere/tokenizer\.json: missing"):
        run(recipe_in(made, "taken", tokenizers=tmp_path / "nowhere"))
    assert contents(tmp_path / "data") == before


class KilledError(Exception):
    """Stands for a kill: nothing in the program catches it."""


PLACED = ["provenance.json", "tokenizer.json", "codec", "vocabulary.json"]


@pytest.mark.parametrize("name", PLACED)
def test_taking_goes_on_after_a_kill(made, tmp_path, monkeypatch, name):
    recipe = recipe_in(made, tokenizers=made / "taken", path=tmp_path / "data")

    def replace(source, target):
        if Path(target).name == name:
            raise KilledError
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("moma.files.os.replace", replace)
        with pytest.raises(KilledError):
            run(recipe)
    assert not (tmp_path / "data" / name).exists()
    run(recipe)
    # From the first placed part on, the folder is bound.
    assert json.loads((tmp_path / "data/provenance.json").read_text())["tokenizers"].keys() == {
        "data.tokenizers.tokenizer",
        "data.tokenizers.codec",
    }
    whole = with_changes(recipe, "data", path=tmp_path / "whole")
    run(whole)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


# Text alone


def test_text_alone_takes_a_folder_that_has_only_a_text_tokenizer(made, tmp_path):
    recipe = recipe_in(made)
    texts = ["red green rocket left of an apple"] * 9
    only_text = Tokenizers(tmp_path / "tokenizers")
    make_text_tokenizer(recipe.text_tokenizer, recipe.codec, texts, only_text)
    alone = text_alone(recipe, tokenizers=only_text.path, path=tmp_path / "data")
    vocabulary = run(alone).vocabulary
    assert vocabulary == Vocabulary.load(only_text.vocabulary)
    assert (len(vocabulary.image_codes), vocabulary.codes_per_image) == (16, 16)
    assert not (tmp_path / "data/codec").exists()
    assert next(Batches(alone.data, vocabulary, seed=0)).padding == 0
    with pytest.raises(UserError, match=r"no image codec, and image_share is 0\.25; make one"):
        run(recipe_in(made, tokenizers=only_text.path, path=tmp_path / "images"))
    assert not (tmp_path / "images/tokenizer.json").exists()
    unasked = recipe_in(made, tokenizers=only_text.path, path=tmp_path / "no", image_share=0)
    with pytest.raises(UserError, match=r"an image, but no codec: data\.tokenizers has none"):
        run(unasked)


def test_text_alone_reserves_codes_for_images_that_come_later(tmp_path):
    recipe = recipe_in(tmp_path)
    alone = text_alone(recipe)
    vocabulary = run(alone).vocabulary
    assert not (tmp_path / "data/codec").exists()
    tokenizer = (tmp_path / "data/tokenizer.json").read_bytes()
    # The same folder, with images: the codec joins the tokenizer, no id changes.
    assert run(recipe).vocabulary == vocabulary
    assert ImageCodec.load(tmp_path / "data/codec").codes_per_image == vocabulary.codes_per_image
    assert (tmp_path / "data/tokenizer.json").read_bytes() == tokenizer
