"""The estimate of a job: close to what preparing it gives."""

import json

import pytest
import torch

from moma.data.documents import SourcePart
from moma.data.encode import estimate as module
from moma.data.encode.estimate import estimate
from moma.data.encode.tokens import BATCH_IMAGES
from moma.data.sources.text import TextConfig
from moma.images import square_pixels
from moma.tokenizers.text import encode_texts
from tests.command_line import moma, refuses, succeeds
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
    # Tokenizer and codec need not exist.
    assert before["tokens"] and before["cost"] == pytest.approx(3 * before["hours"])
    assert all(found["hours"] > 0 for found in before["sources"].values())
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
    assert "captions" in table and "unknown" in table and "nothing was written" in table  # cost
    assert not recipe.data.path.exists()
    assert moma("prepare", tmp_path / "recipe.toml", "--price", "2").code == 2
    for option in ("--verify", "--ray=auto"):
        assert "no effect with --plan" in refuses(
            "prepare", tmp_path / "recipe.toml", "--plan", option
        )


class Clock:
    """Time that passes only where a test says so."""

    def __init__(self, monkeypatch, module):
        self.seconds = 0.0
        for name in ("monotonic", "process_time"):
            monkeypatch.setattr(module.time, name, lambda: self.seconds)

    def slow(self, function, seconds):
        def call(*arguments):
            self.seconds += seconds
            return function(*arguments)

        return call


@pytest.mark.parametrize(("device", "hours"), [("cpu", 30 * 2 / 4), ("meta", 30 * 2 / 3)])
def test_images_take_the_time_of_all_cores_or_of_all_gpus(tmp_path, monkeypatch, device, hours):
    recipe = make_recipe(tmp_path, 30, part_bytes=2**20)
    clock = Clock(monkeypatch, module)
    codec = clock.slow(lambda codec, device, pixels: None, BATCH_IMAGES * 2 * 3600)
    monkeypatch.setattr(module, "encode_images", codec)
    monkeypatch.setattr(module, "local_devices", lambda device: [device] * 3)
    found = estimate(recipe, torch.device(device), processes=8, price=None)
    assert found["sources"]["captions"]["hours"] == pytest.approx(hours)


def test_the_first_image_is_not_measured(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, 30)
    clock = Clock(monkeypatch, module)
    calls = {"read": 0, "encode": 0}

    def slow_at_first(function, name):
        def call(*arguments):
            calls[name] += 1
            clock.seconds += 3600 if calls[name] == 1 else 0
            return function(*arguments)

        return call

    monkeypatch.setattr(module, "square_pixels", slow_at_first(square_pixels, "read"))
    monkeypatch.setattr(module, "encode_images", slow_at_first(module.encode_images, "encode"))
    assert estimate(recipe, CPU, processes=1, price=None)["hours"] == 0
    assert calls["read"] > 1 and calls["encode"] == 2


@pytest.mark.parametrize(("processes", "hours"), [(1, 60), (2, 30), (8, 30)])
def test_a_part_takes_one_process_and_sources_share_them(tmp_path, monkeypatch, processes, hours):
    recipe = make_recipe(tmp_path, 30)  # each source is one part
    clock = Clock(monkeypatch, module)
    monkeypatch.setattr(module, "encode_texts", clock.slow(encode_texts, 30 * 3600))
    found = estimate(recipe, CPU, processes, price=2.0)
    assert [its["hours"] for its in found["sources"].values()] == pytest.approx([30, 30])
    assert found["hours"] == pytest.approx(hours) and found["cost"] == pytest.approx(2 * hours)


def test_text_that_is_not_unicode_has_no_effect(tmp_path):
    recipe = make_recipe(tmp_path, 20)
    (tmp_path / "rows.jsonl").write_text('{"text": "half a pair: \\ud800"}\n{"text": "good"}\n')
    source = TextConfig(path=tmp_path / "rows.jsonl")
    data = recipe.data.model_copy(update={"sources": (source,)})
    changed = recipe.model_copy(update={"data": data})
    assert estimate(changed, CPU, processes=1, price=None)["documents"] == 2


def test_an_empty_source_is_not_one_that_is_not_cut(tmp_path):
    recipe = make_recipe(tmp_path, 20)
    (tmp_path / "words.txt").write_text("")
    found = estimate(recipe, CPU, processes=2, price=None)
    assert found["sources"]["text"]["documents"] == 0 and found["uncut"] == []


def test_a_source_that_is_not_cut_is_named_and_read_by_one_process(tmp_path, monkeypatch):
    write_recipe(make_recipe(tmp_path, 30), tmp_path / "recipe.toml")
    plan = "prepare", tmp_path / "recipe.toml", "--plan", "--processes", "8"
    assert "can only be read" not in succeeds(*plan)
    monkeypatch.setattr(TextConfig, "parts", lambda self, part_bytes: [SourcePart()])
    assert "text: can only be read from the beginning" in " ".join(succeeds(*plan).split())
    clock = Clock(monkeypatch, module)
    monkeypatch.setattr(module, "encode_texts", clock.slow(encode_texts, 30 * 3600))
    found = json.loads(succeeds(*plan, "--json"))["sources"]["text"]
    assert (found["parts"], found["documents"]) == (1, 30)
    assert found["hours"] == pytest.approx(30)
