"""`moma bench throughput` on a tiny model: micro-batches, FLOPs, memory, output."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from moma.bench import throughput as bench
from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.cli import app
from moma.data.batches.packing import NO_LABEL
from moma.errors import UserError
from moma.plan.counts import plan
from moma.vocabulary import IMAGE
from tests.factories import write_recipe

SMALL = [
    "model.dim=16", "model.layers=2", "model.heads=2", "data.micro_batch_size=2",
    "data.sequence_length=64",
    "data.image_share=0.25", "codec.image_size=64", "text_tokenizer.vocabulary_size=320",
    "codec.codebook_size=32", "pretrain.compile=false",
]  # fmt: skip
KEYS = {"name", "tokens_per_second", "mfu", "peak_bytes", "spread"}


@pytest.mark.parametrize("words", [0, -1])
def test_a_vocabulary_without_words_is_refused(tiny, words):
    codes = tiny.text_tokenizer.vocabulary_size - 5 - words  # 5 special ids
    codec = tiny.codec.model_copy(update={"codebook_size": codes})
    with pytest.raises(UserError, match=f"too small for {codes} image codes; raise it"):
        synthetic_vocabulary(tiny.model_copy(update={"codec": codec}))


def test_synthetic_batches_have_the_shape_of_real_ones(tiny):
    vocabulary = synthetic_vocabulary(tiny)
    packer = synthetic_batches(tiny, vocabulary)
    first, second = packer.pack(), packer.pack()
    for batch in (first, second):
        image = vocabulary.modality_of_id[batch.tokens_BS] == IMAGE
        assert image.mean() == tiny.data.image_share and batch.padding == 0
        inside = batch.document_ids_BS[:, :-1] == batch.document_ids_BS[:, 1:]
        assert np.array_equal(batch.labels_BS[:, :-1][inside], batch.tokens_BS[:, 1:][inside])
        assert (batch.labels_BS == NO_LABEL).any() and batch.document_ids_BS.max() > 0
    assert not np.array_equal(first.tokens_BS, second.tokens_BS)
    again = synthetic_batches(tiny, vocabulary).pack()
    assert np.array_equal(first.tokens_BS, again.tokens_BS)
    other = synthetic_batches(tiny, vocabulary, rank=1).pack()
    assert not np.array_equal(first.tokens_BS, other.tokens_BS)


def test_architectures_of_table_2_have_equal_flops():
    for row in bench.ROWS:
        recipes = bench.table2(row)
        assert tuple(recipes) == bench.TABLE2
        flops = {name: plan(recipe)["flops_per_token"] for name, recipe in recipes.items()}
        assert all(count == pytest.approx(flops["dense"], rel=0.1) for count in flops.values())
    assert flops.keys() == bench.table2("256").keys()
    small = {name: plan(recipe)["flops_per_token"] for name, recipe in bench.table2("256").items()}
    assert all(count == pytest.approx(small["dense"], rel=0.01) for count in small.values())
    assert {recipe.model.dim for recipe in bench.table2("256").values()} == {256}


def test_unknown_rows_and_architectures_are_refused():
    with pytest.raises(UserError, match="--row 7b: use 256, 90m, 435m, 1b4"):
        bench.table2("7b")
    with pytest.raises(UserError, match="--only mamba: use dense, moe_8x"):
        bench.table2("256", only=["mamba"])
    assert list(bench.table2("256", only=["moe_8x"])) == ["dense", "moe_8x"]


def test_table_2_prints_one_json_list():
    arguments = ["bench", "throughput", "--table2", "--repeats", "2", "--warm-up", "1", "--json"]
    result = CliRunner().invoke(app, [*arguments, *SMALL])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["name"] for row in rows] == list(bench.TABLE2)
    assert rows[0]["ratio_to_dense"] == 1
    for row in rows:
        assert row.keys() >= KEYS | {"ratio_to_dense"}
        assert all(row[key] > 0 for key in KEYS - {"name"})
    # Weights, gradients and optimizer state of eight experts instead of one.
    assert rows[3]["peak_bytes"] > rows[0]["peak_bytes"]


def test_recipes_are_measured_and_shown_as_a_table(tiny, tmp_path):
    for name, groups in (("one", "dense"), ("two", "moe_2t2i")):
        model = tiny.model.model_copy(update={"groups": groups})
        write_recipe(tiny.model_copy(update={"model": model}), tmp_path / f"{name}.toml")
    paths = [str(tmp_path / "one.toml"), str(tmp_path / "two.toml")]
    options = ["data.micro_batch_size=4", "--repeats", "1", "--warm-up", "1"]
    arguments = ["bench", "throughput", *paths, *options]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    one, two = json.loads(result.stdout)
    assert (one["name"], two["name"], one["ratio_to_first"]) == ("one", "two", 1)
    assert one["flops_per_token"] < two["flops_per_token"]
    table = CliRunner().invoke(app, [*arguments, "--statistics"]).stdout
    assert "overhead" in table and "two" in table


def test_missing_and_ambiguous_recipes_are_refused(tmp_path):
    result = CliRunner().invoke(app, ["bench", "throughput"])
    assert isinstance(result.exception, UserError) and "--table2" in str(result.exception)
    with pytest.raises(UserError, match=r"another recipe is named a"):
        (tmp_path / "b").mkdir()
        write_recipe(bench.table2("256")["dense"], tmp_path / "a.toml")
        bench.named([tmp_path / "a.toml", tmp_path / "b" / "a.toml"])
