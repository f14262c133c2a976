"""`moma bench data` on tiny data: counts are right, all figures are there."""

import json

import pytest
from typer.testing import CliRunner

from moma.bench import data as bench_data
from moma.cli import app
from moma.data.documents import ImageRef
from moma.errors import UserError
from moma.recipe import read_recipe, shipped_recipe, write_recipe
from moma.train.recipe import Recipe

SIZES = bench_data.Sizes(batches=3, steps=1, images=6, texts=20, repeats=1)
REQUIRED = {
    "tokens_per_second", "padding_share", "image_share_error", "wait_share", "codec_ratio",
    "bpe_ratio",
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tiny):
    return bench_data.bench_data(tiny, SIZES, quiet=True)


def test_every_figure_is_there_and_possible(measured):
    assert measured.keys() >= REQUIRED
    assert measured["image_share_error"] == measured["padding_share"] == 0
    assert 0 < measured["wait_share"] < 1
    assert all(measured[key] > 0 for key in REQUIRED if key.endswith(("ratio", "second")))


def test_it_counts_what_is_in_the_arrays(tiny, monkeypatch):
    """A missing image, or padding, is found whatever the batch's own fields say."""
    from moma.data.batches.packing import Packer
    from moma.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    real = Packer.pack

    def spoil(self):
        batch = real(self)
        batch.tokens_BS[0, :32] = vocabulary.padding
        return batch

    monkeypatch.setattr(Packer, "pack", spoil)
    found = bench_data._balance(tiny, vocabulary, SIZES)
    assert found["padding_share"] == pytest.approx(0.25)
    assert 0 < found["image_share_error"] <= 0.25


def test_images_are_measured_once_each(tiny, tmp_path):
    wanted = 24  # four colours in 8 × 8 places: some of them are equal
    count = bench_data._write_captions(bench_data._images_of(tiny, wanted), tmp_path / "c")
    rows = (tmp_path / "c" / "captions.jsonl").read_text().splitlines()
    files = list((tmp_path / "c").glob("*.png"))
    assert 4 <= count == len(rows) == len(files) <= wanted
    assert {json.loads(row)["image"] for row in rows} == {file.name for file in files}


def test_the_verb_prints_one_json_object(tiny, tmp_path):
    write_recipe(tiny, tmp_path / "r.toml")
    sizes = ["--batches", "2", "--steps", "1", "--images", "2", "--texts", "5", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", "data", str(tmp_path / "r.toml"), "--json", *sizes])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout).keys() >= REQUIRED


def test_the_shipped_recipe_is_valid_and_asks_for_1024_codes():
    recipe = read_recipe(Recipe, shipped_recipe("bench_data.toml"))
    assert recipe.codec.codes_per_side**2 == 1024
    assert recipe.data.sequence_length == 4096


def test_images_that_cannot_be_read_are_passed_over(tiny, tmp_path):
    def missing():
        raise UserError("there is none")

    images = [*bench_data._images_of(tiny, 1), ImageRef("missing", missing)]
    assert bench_data._write_captions(iter(images[::-1]), tmp_path / "c") == 1
