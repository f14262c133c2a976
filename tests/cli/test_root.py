"""The verbs from end to end on a user's own folder."""

import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.command_line import metrics_of, refuses, succeeds
from tests.processes import Command

METRIC_KEYS = {
    "step",
    "tokens",
    "flops",
    "loss",
    "loss_text",
    "loss_image",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
}
RESULT_KEYS = {
    "loss",
    "loss_text",
    "loss_image",
    "perplexity_text",
    "perplexity_image",
    "tokens",
}


def test_a_run_folder_has_all_its_files(trained):
    for run in (trained / "run", trained / "run" / "aux_router"):
        for name in ("recipe.toml", "tokenizer.json", "vocabulary.json", "codec/config.json"):
            assert (run / name).is_file()
        assert list(run.glob("checkpoints/step-*"))
        assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize(("run", "steps"), [("run", [2, 4]), ("run/aux_router", [1, 2])])
def test_every_log_record_has_the_documented_keys(trained, run, steps):
    records = metrics_of(trained / run)
    assert [record["step"] for record in records] == steps
    for record in records:
        assert record.keys() >= METRIC_KEYS
        assert all(math.isfinite(record[key]) for key in METRIC_KEYS)
        assert record["tokens"] == record["step"] * 2 * 64
        assert record["gradient_norm"] > 0
    assert records[1]["flops"] == pytest.approx(records[0]["flops"] / steps[0] * steps[1])


@pytest.mark.parametrize("routing", ["choice", "causal"])
def test_evaluation_covers_every_held_out_target(trained, routing):
    result = json.loads(succeeds("evaluate", trained / "run", "--routing", routing, "--json"))
    assert result.keys() == RESULT_KEYS
    for modality in ("text", "image"):
        expected = math.exp(result[f"loss_{modality}"])
        assert result[f"perplexity_{modality}"] == pytest.approx(expected)
    shards = [json.loads(path.read_text()) for path in trained.glob("data/shards/*/shard.json")]
    held_out = [shard["counts"]["held_out"] for shard in shards]
    # Every token but the first of a document is a target; an image has 16 codes.
    assert result["tokens"] == sum(part["tokens"] - part["documents"] for part in held_out)
    image = 16 * sum(part["images"] for part in held_out) / result["tokens"]
    assert 0 < image < 1
    mean = image * result["loss_image"] + (1 - image) * result["loss_text"]
    assert result["loss"] == pytest.approx(mean)


def test_the_two_routings_differ(trained):
    losses = [
        json.loads(succeeds("evaluate", trained / "run", "--routing", routing, "--json"))["loss"]
        for routing in ("choice", "causal")
    ]
    assert losses[0] != losses[1]


def test_moved_data_can_be_given(trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained / "data", moved)
    there = succeeds("evaluate", trained / "run", "--data", moved, "--json")
    assert there == succeeds("evaluate", trained / "run", "--json")
    assert str(tmp_path) in refuses("evaluate", trained / "run", "--data", tmp_path)


def test_evaluation_without_json_is_a_table(trained):
    out = succeeds("evaluate", trained / "run")
    assert all(key in out for key in RESULT_KEYS)


def test_text_mode_writes_no_image(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = succeeds("generate", trained / "run", "--prompt", "box 3", "--mode", "text")
    assert text.strip()
    assert not list(tmp_path.iterdir())


def test_image_mode_writes_one_png(trained, tmp_path):
    out = tmp_path / "out"
    printed = succeeds(
        "generate", trained / "run", "--prompt", "box 3", "--mode", "image", "--out", out
    )
    (path,) = out.glob("*.png")
    assert printed == f"{path}\n"
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (32, 32))


def test_generated_images_never_overwrite_files(trained, tmp_path):
    (tmp_path / "image_1.png").write_text("mine")
    (tmp_path / "image_2.png").symlink_to("nowhere")
    options = ("--prompt", "box 3", "--mode", "image", "--out", tmp_path)
    printed = [succeeds("generate", trained / "run", *options).strip() for _ in range(2)]
    assert printed == [str(tmp_path / "image_3.png"), str(tmp_path / "image_4.png")]
    assert (tmp_path / "image_1.png").read_text() == "mine"
    assert (tmp_path / "image_2.png").is_symlink() and not (tmp_path / "nowhere").exists()


def test_mixed_mode_continues_an_image(trained, tmp_path):
    out = tmp_path / "out"
    image = trained / "images" / "1.png"
    printed = succeeds("generate", trained / "run", "--image", image, "--out", out)
    assert printed.strip()
    lines = {line for line in printed.splitlines() if line.startswith(str(out))}
    assert lines == {str(path) for path in out.glob("*.png")}


def test_generation_depends_on_the_seed(trained):
    def text(seed, *more):
        options = ("--prompt", "box", "--mode", "text", "--seed", seed, *more)
        return succeeds("generate", trained / "run", *options)

    assert text(1) == text(1) != text(2)
    assert text(1, "--temperature", 0) == text(2, "--temperature", 0)


def test_the_report_is_one_file(trained, tmp_path):
    page = tmp_path / "new" / "report.html"
    result = json.loads(succeeds("report", trained / "run", "--out", page, "--json"))
    assert result.keys() == {"runs", "speedup", "speedup_seconds", "warning"}
    assert result["runs"]["run"].keys() == {"choice", "causal", "auxiliary"}
    assert result["runs"]["run"]["causal"].keys() == RESULT_KEYS
    assert {path.name for path in page.parent.iterdir()} == {"report.html", ".moma-output.json"}
    assert "Which expert took which token" in page.read_text(encoding="utf-8")


def test_the_report_prints_tables(trained, tmp_path, undrawn):
    page = tmp_path / "page.html"
    printed = succeeds("report", trained / "run", "--out", page)
    assert "Held-out documents" in printed and "causal" in printed and "None" not in printed
    assert printed.rstrip().endswith(f"report: {page}".rpartition("/")[2])


def test_training_prints_the_next_command(trained):
    printed = succeeds("train", trained / "recipe.toml").split("next: moma ")[1].split()
    assert printed == ["evaluate", str(trained / "run"), "--routing", "causal"]


def test_finished_work_is_not_repeated(trained):
    files = [path for path in trained.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    succeeds("prepare", trained / "recipe.toml")
    succeeds("train", trained / "recipe.toml")
    assert {path: path.read_bytes() for path in files} == before


def test_json_output_is_one_object(trained, tmp_path):
    """Also what libraries write to the file descriptor."""
    command = Command(tmp_path, "evaluate", trained / "run", "--json")
    out, errors = command.communicate()
    assert command.returncode == 0, errors
    assert json.loads(out).keys() == RESULT_KEYS


def test_runs_with_the_same_name_are_both_reported(trained, tmp_path, undrawn):
    shutil.copytree(trained / "run", tmp_path / "run")
    page = tmp_path / "report.html"
    out = succeeds("report", trained / "run", tmp_path / "run", "--out", page, "--json")
    assert len(json.loads(out)["runs"]) == 2


@pytest.fixture(scope="module")
def text_run(trained, tmp_path_factory) -> Path:
    """A run without images on the prepared data."""
    run = tmp_path_factory.mktemp("text") / "run"
    changes = ["data.image_share=0", "model.groups=dense", f"run={run}"]
    succeeds("train", trained / "recipe.toml", *changes)
    return run


def test_unmeasured_losses_are_null(text_run):
    result = json.loads(succeeds("evaluate", text_run, "--json"))
    assert result["loss"] == result["loss_text"] > 0
    assert result["loss_image"] is None and result["perplexity_image"] is None
    assert [record["loss_image"] for record in metrics_of(text_run)] == [None, None]


def test_training_resumes_after_a_truncated_log_record(text_run, trained):
    before = metrics_of(text_run)
    with (text_run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    shutil.rmtree(max((text_run / "checkpoints").glob("step-*")))  # so that it has to resume
    changes = ["data.image_share=0", "model.groups=dense", f"run={text_run}"]
    succeeds("train", trained / "recipe.toml", *changes)
    assert len(metrics_of(text_run)) == len(before)


def test_calibrate_computes_thresholds_without_training(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    evaluate = ("evaluate", run, "--routing", "threshold", "--json")
    before = json.loads(succeeds(*evaluate))["loss"]
    losses = []
    for steps in (1, 3):
        assert (
            succeeds("calibrate", run, "--steps", steps).strip() == f"{run}/thresholds.safetensors"
        )
        losses.append(json.loads(succeeds(*evaluate))["loss"])
    assert len({before, *losses}) == 3
