"""The tokenizers of a data folder: trained or copied, and which keys may change later."""

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
    """A prepared folder, from which tokenizers are copied."""
    folder = tmp_path_factory.mktemp("made")
    run(make_recipe(folder, ROWS, "prepared"))
    return folder


def recipe_in(folder, data="data", **changes):
    """A recipe with the sources that the module shares."""
    return make_recipe(folder, ROWS, data, **changes)


def with_changes(recipe, section, **changes):
    changed = getattr(recipe, section).model_copy(update=changes)
    return recipe.model_copy(update={section: changed})


def text_only(recipe, **changes):
    sources = [source for source in recipe.data.sources if source.name == "text"]
    return with_changes(recipe, "data", sources=sources, image_share=0, **changes)


# Trained


def test_prepare_keeps_the_log_and_metrics_of_its_codec(made):
    folder = Tokenizers(made / "prepared")
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
def test_changed_keys_of_trained_tokenizers_are_refused_by_name(made, section, changes, named):
    before = contents(made / "prepared")
    with pytest.raises(UserError, match=named):
        run(with_changes(recipe_in(made, "prepared"), section, **changes))
    assert contents(made / "prepared") == before


def test_intervals_of_logging_are_not_compared(made):
    before = contents(made / "prepared")
    changes = {"log_every": 1, "measure_every": 1, "save_every": 1}
    run(with_changes(recipe_in(made, "prepared"), "codec_training", **changes))
    assert contents(made / "prepared") == before


def test_another_seed_is_refused_by_name(made):
    with pytest.raises(UserError, match=r"\(seed\).*data\.path"):
        run(recipe_in(made, "prepared").model_copy(update={"seed": 4}))


def test_keys_may_change_until_a_tokenizer_is_trained(tmp_path):
    recipe = recipe_in(tmp_path)
    with pytest.raises(UserError, match="at least"):
        run(with_changes(recipe, "codec", codebook_size=64))
    run(recipe)


def test_tokenizers_are_trained_on_max_documents(made):
    recipe = with_changes(recipe_in(made, "few"), "text_tokenizer", max_documents=9)
    run(with_changes(recipe, "codec_training", max_documents=9))
    for name in ("tokenizer.json", "codec/model.safetensors"):
        assert (made / "few" / name).read_bytes() != (made / "prepared" / name).read_bytes()


# Copied


def test_keys_without_effect_are_not_compared(made, tmp_path):
    recipe = recipe_in(made, tokenizers=made / "prepared", path=tmp_path / "data")
    prepared = run(recipe)
    other = with_changes(recipe, "codec", codebook_size=99, image_size=64)
    other = with_changes(other, "text_tokenizer", vocabulary_size=5000)
    other = with_changes(other, "codec_training", steps=9).model_copy(update={"seed": 9})
    before = contents(tmp_path / "data")
    assert run(other).vocabulary == prepared.vocabulary
    assert contents(tmp_path / "data") == before
    for name in ("tokenizer.json", "vocabulary.json", "codec/model.safetensors"):
        assert before[name] == (made / "prepared" / name).read_bytes()


def test_equal_tokenizers_in_another_folder_are_accepted(made, tmp_path):
    shutil.copytree(made / "prepared", tmp_path / "copy")
    recipe = recipe_in(made, tokenizers=tmp_path / "copy", path=tmp_path / "data")
    prepared = run(recipe)
    moved = with_changes(recipe, "data", tokenizers=made / "prepared")
    assert run(moved).summary() == prepared.summary()
    # The folder is not needed after its files are copied.
    shutil.rmtree(tmp_path / "copy")
    assert run(recipe).summary() == prepared.summary()


def test_other_tokenizers_are_refused(made, tmp_path):
    shutil.copytree(made / "prepared", tmp_path / "copy")
    recipe = recipe_in(made, tokenizers=tmp_path / "copy", path=tmp_path / "data")
    run(recipe)
    with (tmp_path / "copy/codec/config.json").open("a") as file:
        file.write("\n")
    before = contents(tmp_path / "data")
    with pytest.raises(UserError, match=r"\(data\.tokenizers\.codec\)"):
        run(recipe)
    with pytest.raises(UserError, match=r"made with another configuration.*seed"):
        run(with_changes(recipe, "data", tokenizers=None))
    with pytest.raises(UserError, match="nowhere: there are no tokenizers"):
        run(recipe_in(made, "prepared", tokenizers=tmp_path / "nowhere"))
    assert contents(tmp_path / "data") == before


class KilledError(Exception):
    """Simulates a kill: nothing in the program catches it."""


@pytest.fixture(scope="module")
def copied(made):
    """What is prepared with copied tokenizers."""
    recipe = recipe_in(made, tokenizers=made / "prepared", path=made / "copied")
    run(recipe)
    return contents(made / "copied")


COPIED = ["provenance.json", "tokenizer.json", "codec", "vocabulary.json"]


@pytest.mark.parametrize("name", COPIED)
def test_copying_tokenizers_continues_after_a_kill(made, copied, tmp_path, monkeypatch, name):
    recipe = recipe_in(made, tokenizers=made / "prepared", path=tmp_path / "data")

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
    # From the first copied file on, the folder keeps its tokenizers.
    assert json.loads((tmp_path / "data/provenance.json").read_text())["tokenizers"].keys() == {
        "data.tokenizers.tokenizer",
        "data.tokenizers.codec",
    }
    assert contents(tmp_path / "data") == copied


# Text only


def test_text_only_data_needs_only_a_text_tokenizer(made, tmp_path):
    recipe = recipe_in(made)
    texts = ["red green rocket left of an apple"] * 9
    tokenizers = Tokenizers(tmp_path / "tokenizers")
    make_text_tokenizer(recipe.text_tokenizer, recipe.codec, texts, tokenizers)
    recipe_of_text = text_only(recipe, tokenizers=tokenizers.path, path=tmp_path / "data")
    vocabulary = run(recipe_of_text).vocabulary
    assert vocabulary == Vocabulary.load(tokenizers.vocabulary)
    assert (len(vocabulary.image_codes), vocabulary.codes_per_image) == (16, 16)
    assert not (tmp_path / "data/codec").exists()
    assert next(Batches(recipe_of_text.data, vocabulary, seed=0)).padding == 0
    with pytest.raises(UserError, match=r"no image codec, and image_share is 0\.25; make one"):
        run(recipe_in(made, tokenizers=tokenizers.path, path=tmp_path / "images"))
    assert not (tmp_path / "images/tokenizer.json").exists()
    without_share = recipe_in(made, tokenizers=tokenizers.path, path=tmp_path / "no", image_share=0)
    with pytest.raises(UserError, match=r"an image, but no codec: data\.tokenizers has none"):
        run(without_share)


def test_text_only_data_reserves_codes_for_later_images(tmp_path):
    recipe = recipe_in(tmp_path)
    recipe_of_text = text_only(recipe)
    vocabulary = run(recipe_of_text).vocabulary
    assert not (tmp_path / "data/codec").exists()
    tokenizer = (tmp_path / "data/tokenizer.json").read_bytes()
    # The same folder, with images: the codec joins the tokenizer, no id changes.
    assert run(recipe).vocabulary == vocabulary
    assert ImageCodec.load(tmp_path / "data/codec").codes_per_image == vocabulary.codes_per_image
    assert (tmp_path / "data/tokenizer.json").read_bytes() == tokenizer
