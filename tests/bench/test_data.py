"""`moma bench data` on tiny data: counts are right, all figures are there."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from moma.bench import data as bench_data
from moma.cli import app
from moma.data.batches.packing import Packer
from moma.data.documents import Document, ImageRef
from moma.errors import UserError
from moma.recipe import read_recipe, shipped_recipe
from moma.train.recipe import Recipe
from moma.vocabulary import Vocabulary
from tests.factories import write_recipe

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


def test_the_arrays_of_batches_are_counted(tiny, monkeypatch):
    """A missing image or padding is found independently of the batch's own fields."""
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    real = Packer.pack

    def spoil(self):
        batch = real(self)
        batch.tokens_BS[0, :32] = vocabulary.padding
        return batch

    monkeypatch.setattr(Packer, "pack", spoil)
    found = bench_data.measure_balance(tiny, vocabulary, SIZES)
    assert found["padding_share"] == pytest.approx(0.25)
    assert 0 < found["image_share_error"] <= 0.25


def test_images_are_measured_once_each(tiny):
    wanted = 24  # four colors in 8 × 8 positions: some of them are equal
    images = bench_data.distinct_images(bench_data.documents_of(tiny), wanted)
    pixels = {image.read().convert("RGB").tobytes() for image in images}
    assert 4 <= len(images) == len(pixels) <= wanted


def test_unreadable_images_are_skipped():
    def missing():
        raise UserError("there is none")

    images = ImageRef("missing", missing), ImageRef("one", lambda: Image.new("L", (2, 2)))
    (found,) = bench_data.distinct_images([Document("", images)], 2)
    assert found.read().convert("RGB").tobytes() == bytes(12)


def test_the_verb_prints_one_json_object(tiny, tmp_path):
    write_recipe(tiny, tmp_path / "r.toml")
    sizes = ["--batches", "2", "--steps", "1", "--images", "2", "--texts", "5", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", "data", str(tmp_path / "r.toml"), "--json", *sizes])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout).keys() >= REQUIRED


def test_the_shipped_recipe_is_valid_and_has_images_of_1024_codes():
    recipe = read_recipe(Recipe, shipped_recipe("bench_data.toml"))
    assert recipe.codec.codes_per_side**2 == 1024
    assert recipe.data.sequence_length == 4096
