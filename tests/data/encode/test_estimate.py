"""The estimate of a job: close to what preparing it gives."""

import json

import pytest
import torch

from moma.data.encode.estimate import estimate
from tests.command_line import moma
from tests.data.encode.preparing import make_recipe, run
from tests.factories import write_recipe

CPU = torch.device("cpu")


def test_an_estimate_is_close_to_what_is_prepared(tmp_path):
    recipe = make_recipe(tmp_path, 60, part_bytes=15 * 2**17)
    before = estimate(recipe, CPU, processes=2, price=3.0)
    assert not recipe.data.path.exists()
    text = before["sources"]["text"]
    assert text["parts"] == 1 and text["documents"] == 60
    assert text["bytes"] == (tmp_path / "words.txt").stat().st_size
    # Without a codec, the hours of images are unknown.
    assert before["sources"]["captions"]["hours"] is before["hours"] is before["cost"] is None
    found = run(recipe, processes=1).summary()
    after = estimate(recipe, CPU, processes=2, price=3.0)
    assert after["parts"] == 5 and after["documents"] == 120 and after["images"] == 60
    assert after["tokens"] == pytest.approx(found["tokens"], rel=0.1)
    assert after["cost"] == pytest.approx(3 * after["hours"]) and after["hours"] > 0
    slower = estimate(recipe, CPU, processes=1, price=None)
    assert slower["cost"] is None


def test_the_plan_is_printed_and_nothing_is_written(tmp_path):
    recipe = make_recipe(tmp_path, 20)
    write_recipe(recipe, tmp_path / "recipe.toml")
    outcome = moma("prepare", tmp_path / "recipe.toml", "--plan", "--json", "--price", "2")
    assert outcome.code == 0 and json.loads(outcome.out)["documents"] == 40
    table = moma("prepare", tmp_path / "recipe.toml", "--plan").out
    assert "captions" in table and "unknown" in table and "nothing was written" in table
    assert not recipe.data.path.exists()
    assert moma("prepare", tmp_path / "recipe.toml", "--price", "2").code == 2
