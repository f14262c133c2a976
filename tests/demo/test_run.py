"""The demo from end to end with a tiny model, and its continuation."""

import json
import re

import pytest

from moma.data.outputs import write_output
from moma.demo.run import Clock, demo_tables, run_demo
from moma.errors import UserError
from tests.processes import forked

SMALL = [
    "codec_training.steps=6",
    "codec_training.quantizer_start_step=2",
    "codec_training.batch_size=8",
    "codec.block_channels=[16]",
    "codec.image_size=32",
    "codec.codebook_size=64",
    "text_tokenizer.vocabulary_size=400",
    "data.micro_batch_size=1",
    "data.image_share=0.25",
    "data.held_out=0.05",
    "data.sources.0.objects=40",
    "data.sources.0.repeats=1",
    "data.sources.1.objects=40",
    "data.sources.1.repeats=1",
    "data.sources.2.objects=40",
    "data.sources.2.count=60",
    "data.sources.3.objects=40",
    "data.sources.4.entries=60",
    "model.dim=16",
    "model.heads=2",
    "model.layers=1",
    "pretrain.steps=4",
    "pretrain.log_every=2",
    "pretrain.checkpoint_every=2",
    "pretrain.compile=false",
    "aux_router.steps=2",
    "aux_router.log_every=1",
    "aux_router.checkpoint_every=2",
    "aux_router.compile=false",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a finished demo and its result, with few images."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, forked():
        for name, number in (("SINGLES", 6), ("COMPOSITIONS", 4), ("CAPTIONS", 4)):
            patch.setattr(f"moma.demo.run.{name}", number)
        yield out, run_demo(out, SMALL, routers=True, quiet=True)


def test_the_result_has_every_figure(demo):
    out, result = demo
    assert set(result["runs"]) == {"dense", "moe_4t4i"}
    assert set(result["runs"]["dense"]) == {"choice"}
    assert set(result["runs"]["moe_4t4i"]) == {"choice", "causal", "auxiliary"}
    for key in ("speedup", "speedup_seconds"):
        assert set(result[key]["moe_4t4i"]) == {"all", "text", "image"}
    assert set(result["sketches"]["dense"]) == {
        "singles_right",
        "composition_halves_right",
        "captions_right",
    }
    for content in demo_tables(result):
        assert content.rows and all(len(row) == len(content.head) for row in content.rows)
    assert json.loads((out / "result.json").read_text()) == result


def test_the_page_has_every_section(demo):
    out, _ = demo
    page = (out / "report.html").read_text()
    for title in (
        "captions that are right",
        "Images from captions",
        "Training loss",
        "Which expert took",
    ):
        assert title in page
    assert "src='http" not in page and "<script" not in page
    # The true drawing and one of each model for ten captions, and four captioned images.
    assert page.count("alt='true'") == 10 and page.count("alt='moe_4t4i: ") == 10
    # Drawings of routings do not hide each other.
    names = re.findall(r"<input type='radio' name='([^']*)'", page)
    assert len(names) == len(set(names)) == page.count("<div class='routing'>") > 0
    assert (out / "sheet.png").is_file()


@pytest.mark.slow  # test_root.py resumes finished verbs one by one
def test_a_finished_demo_gives_the_same_result_again(demo):
    out, result = demo
    before = {path: path.read_bytes() for path in out.glob("*/checkpoints/*/*") if path.is_file()}
    again = run_demo(out, SMALL, routers=True, quiet=True)
    for key in ("runs", "speedup", "speedup_seconds", "codec", "sketches", "seed"):
        assert again[key] == result[key]
    assert before and before == {path: path.read_bytes() for path in before}


def test_another_demo_in_the_same_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_text("{}")
    (tmp_path / "data" / "provenance.json").write_text(
        '{"kind": "moma data", "tokenizers": {"seed": 5}}'
    )
    with pytest.raises(UserError, match="made with another"):
        run_demo(tmp_path, SMALL, quiet=True)


def test_keys_of_the_demo_and_recipes_without_sketches_are_refused(tmp_path):
    with pytest.raises(UserError, match="the demo sets this key itself"):
        run_demo(tmp_path, ["model.groups=dense"], quiet=True)
    with pytest.raises(UserError, match="no source of kind 'sketches'"):
        run_demo(tmp_path, ['data.sources=[{kind = "dictionary"}]'], quiet=True)
    assert not list(tmp_path.iterdir())


def test_the_clock_sums_over_interruptions(tmp_path):
    file = tmp_path / "minutes.json"
    write_output(file, json.dumps({"work": 1.5, "other": 2.0}).encode())
    with pytest.raises(ValueError, match="stop"), Clock(file)("work"):
        raise ValueError("stop")
    assert json.loads(file.read_text())["work"] >= 1.5
    with Clock(file)("other", repeated=True):
        pass
    assert json.loads(file.read_text())["other"] < 1
