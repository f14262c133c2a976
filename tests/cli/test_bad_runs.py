"""Messages of the verbs that read a run, about runs and prompts that they cannot use."""

import shutil
from pathlib import Path

import pytest

from moma.runs import Run
from tests.command_line import (
    refuses,
    succeeds,
)
from tests.factories import replace_weights


@pytest.fixture
def without_checkpoint(trained, tmp_path) -> Path:
    run = tmp_path / "bare"
    shutil.copytree(trained / "run", run, ignore=shutil.ignore_patterns("checkpoints"))
    return run


@pytest.fixture
def without_routers(trained, tmp_path) -> Path:
    run = tmp_path / "main"
    shutil.copytree(trained / "run", run, ignore=shutil.ignore_patterns("aux_router"))
    return run


@pytest.mark.parametrize(
    "call",
    [
        ("evaluate", "{run}"),
        ("evaluate", "{run}", "--json"),
        ("generate", "{run}", "--prompt", "box", "--out", "{out}"),
        ("report", "{run}", "--out", "{out}"),
    ],
)
def test_an_unusable_run_folder_is_named(trained, tmp_path, without_checkpoint, call):
    out = tmp_path / "out"
    fill = {"run": without_checkpoint, "out": out}
    assert f"{without_checkpoint}: has no checkpoint" in refuses(*(a.format(**fill) for a in call))
    fill["run"] = trained / "images"
    assert f"{trained}/images: not a run folder" in refuses(*(a.format(**fill) for a in call))
    fill["run"] = tmp_path / "nowhere"
    assert f"{tmp_path}/nowhere: there is no such folder" in refuses(
        *(a.format(**fill) for a in call)
    )
    assert not out.exists()


def test_an_unfinished_checkpoint_is_ignored(without_checkpoint, trained):
    (whole,) = trained.glob("run/checkpoints/step-00000004")
    shutil.copytree(whole, without_checkpoint / "checkpoints" / "step-00000004.partial")
    assert "has no checkpoint" in refuses("evaluate", without_checkpoint)


def test_a_damaged_checkpoint_is_named(without_routers):
    for path in without_routers.glob("checkpoints/*/tensors/*"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "step-00000004" in refuses("evaluate", without_routers)


STAGE = ("steps=2", "log_every=1", "checkpoint_every=1")


@pytest.mark.parametrize(
    "call",
    [
        ("evaluate", "{run}"),
        ("generate", "{run}", "--prompt", "box", "--mode", "text"),
        ("inspect", "{run}", "--prompt", "box", "--out", "{out}"),
        ("calibrate", "{run}"),
        ("report", "{run}", "--out", "{out}"),
        ("export", "{run}", "{out}"),
        ("train", "{recipe}", "from={run}", "run={out}"),
        ("train", "{recipe}", "from={run}", "run={out}", "stage=aux_router"),
        (
            *("train", "{recipe}", "from={run}", "run={out}", "stage=upcycle"),
            *(f"upcycle.{key}" for key in STAGE),
        ),
    ],
)
def test_weights_of_another_model_are_named(trained, tmp_path, without_routers, call):
    def change(weights):
        weights["layers.0.other.weight"] = weights.pop("norm.weight")

    checkpoint = replace_weights(Run(without_routers), change)
    fill = {"run": without_routers, "out": tmp_path / "out", "recipe": trained / "recipe.toml"}
    message = refuses(*(argument.format(**fill) for argument in call))
    assert f"{checkpoint}: its weights are not those of the model" in message
    assert "1 missing: norm.weight; 1 unknown: layers.0.other.weight" in message


def test_a_damaged_tokenizer_is_named(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for folder in (run, run / "aux_router"):
        (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refuses("generate", run, "--prompt", "box")


def test_untrained_auxiliary_routers_are_refused(without_routers):
    for arguments in (
        ("evaluate", without_routers),
        ("generate", without_routers, "--prompt", "a"),
    ):
        message = refuses(*arguments, "--routing", "auxiliary")
        assert "stage=aux_router" in message and str(without_routers) in message
    for routing in ("choice", "causal", "threshold"):
        succeeds("evaluate", without_routers, "--routing", routing)


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
def test_a_prompt_longer_than_the_context_is_refused(trained, tmp_path, mode):
    options = ("--mode", mode, *([] if mode == "text" else ["--out", tmp_path / "out"]))
    message = refuses("generate", trained / "run", "--prompt", "word " * 64, *options)
    assert "context of 64" in message and "shorten" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--image", "{folder}/none.png"], "there is no {folder}/none.png"),
        (["--image", "{folder}/text.png"], "cannot read {folder}/text.png"),
        ([], "--prompt"),
        (
            ["--prompt", "a", "--mode", "sound"],
            "'sound' is not one of 'text'",
        ),
        (["--prompt", "a", "--temperature", "-1"], "temperature -1.0"),
        (["--prompt", "a", "--top-p", "0"], "top_p 0.0: must be from 1e-06 to 1"),
        (
            ["--prompt", "a\udcff"],
            "prompt",
        ),
        (
            ["--prompt", "a", "--mode", "image", "--out", "{folder}/text.png"],
            "text.png",
        ),
    ],
)
def test_unusable_prompts_and_images_are_refused(trained, tmp_path, options, named):
    (tmp_path / "text.png").write_text("no image")
    filled = [option.format(folder=tmp_path) for option in options]
    assert named.format(folder=tmp_path) in refuses("generate", trained / "run", *filled)


def test_the_message_for_a_missing_image_does_not_mention_rows(trained, tmp_path):
    assert "row" not in refuses("generate", trained / "run", "--image", tmp_path / "none.png")


def test_an_unknown_routing_is_named(trained):
    message = refuses("evaluate", trained / "run", "--routing", "best")
    assert "'best' is not one of 'choice', 'causal', 'threshold', 'auxiliary', 'half'" in message


def test_a_report_that_cannot_be_written_is_named(trained, tmp_path):
    assert str(tmp_path) in refuses("report", trained / "run", "--out", tmp_path)
