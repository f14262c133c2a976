"""Arguments that are wrong are answered before anything that takes seconds is imported."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.command_line import moma, refuses, succeeds

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "datasets", "grain", "transformers", "diffusers", "pandas", "tokenizers"}
CALL = """
import sys
from moma.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["prepare", "--help"], 0),
        (["prepare", "--nonsense"], 2),
        (["prepare", "missing.toml"], 2),
        (["tokenizer", "train-text", "missing.toml"], 2),
        (["tokenizer", "train-image", "missing.toml"], 2),
        (["tokenizer", "show", "."], 2),
        (["evaluate", "missing"], 2),
        (["generate", "missing", "--prompt", "a"], 2),
    ],
)
def test_answers_that_need_no_model_do_not_wait_for_one(tmp_path, arguments, code):
    done = subprocess.run(
        [sys.executable, "-c", CALL, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    modules = done.stderr.splitlines()[-1].split()
    assert done.returncode == code, done.stderr
    assert "moma.cli" in modules and not HEAVY & set(modules)


def test_the_version_is_that_of_the_package():
    assert succeeds("--version") == f"moma {version('moma')}\n"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (["train", "a.toml", "--pretrain.steps=3"], "without dashes: pretrain.steps=3"),
        (["train", "a.toml", "--pretrain.steps", "3"], "without dashes: pretrain.steps=…"),
        (["train", "a.toml", "--steps=3"], "dashes: steps=3, or with its section as in pretrain."),
        (["bench", "data", "--data.micro_batch_size=3"], "without dashes: data.micro_batch_size=3"),
    ],
)
def test_a_change_written_as_an_option_is_told_how_to_be_written(call, told):
    assert told in refuses(*call)


@pytest.mark.parametrize("call", [["prepare", "a", "--worker=3"], ["evaluate", "a", "--steps=3"]])
def test_other_options_that_there_are_not_are_told_by_the_usage(call):
    outcome = moma(*call)
    assert outcome.code == 2 and "No such option" in outcome.err
    assert "without dashes" not in outcome.err


def test_what_is_no_recipe_and_no_run_is_named(tmp_path):
    (tmp_path / "torn.toml").write_text("[data")
    assert "torn.toml: not valid TOML" in refuses("train", tmp_path / "torn.toml")
    assert "not a run folder" in refuses("evaluate", tmp_path)
