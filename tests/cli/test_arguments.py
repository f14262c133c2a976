"""Wrong arguments are reported before slow imports."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from moma.cli.arguments import load_recipe, with_data
from tests.command_line import moma, refuses, succeeds
from tests.factories import write_minimal_recipe

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
SIMPLE: list[tuple[list[str], int]] = [
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
]
# Each call in a process forked from one that has imported what all need.
FORKED = """
import json, os, sys
from moma.cli import main
for arguments in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    if process := os.fork():
        os.close(writing)
        with open(reading) as file:
            modules = file.read().split()
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps([code, modules]), flush=True)
        continue
    sys.argv[1:], code = arguments, 1
    os.dup2(2, 1)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.write(writing, " ".join(sys.modules).encode())
        os._exit(code)
"""


def test_simple_answers_do_not_import_heavy_libraries(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FORKED, json.dumps([arguments for arguments, _ in SIMPLE])],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (arguments, code), line in zip(SIMPLE, done.stdout.splitlines(), strict=True):
        found, modules = json.loads(line)
        assert found == code, (arguments, done.stderr)
        assert "moma.cli" in modules and not HEAVY & set(modules), arguments


def test_the_version_is_that_of_the_package():
    assert succeeds("--version") == f"moma {version('moma')}\n"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["train", "a.toml", "--pretrain.steps=3"], "without dashes: pretrain.steps=3"),
        (["train", "a.toml", "--pretrain.steps", "3"], "without dashes: pretrain.steps=…"),
        (["train", "a.toml", "--steps=3"], "dashes: steps=3, or with its section as in pretrain."),
        (["bench", "data", "--data.micro_batch_size=3"], "without dashes: data.micro_batch_size=3"),
    ],
)
def test_an_override_written_as_an_option_is_corrected(call, message):
    assert message in refuses(*call)


@pytest.mark.parametrize("call", [["prepare", "a", "--process=3"], ["evaluate", "a", "--steps=3"]])
def test_unknown_options_get_the_usage_message(call):
    outcome = moma(*call)
    assert outcome.code == 2 and "No such option" in outcome.err
    assert "without dashes" not in outcome.err


def test_invalid_recipes_and_runs_are_named(tmp_path):
    (tmp_path / "broken.toml").write_text("[data")
    assert "broken.toml: not valid TOML" in refuses("train", tmp_path / "broken.toml")
    assert "not a run folder" in refuses("evaluate", tmp_path)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["gen"], {"generate"}),
        (["generate", "--rou"], {"--routing"}),
        (["generate", "runs/x", "--mode", ""], {"text", "image", "mixed"}),
        (["train", "", "--j"], set()),
    ],
)
def test_words_are_completed_without_heavy_libraries(words, found):
    environment = {
        "PATH": "",
        "PYTHONPATH": str(ROOT),
        "_MOMA_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["moma", *words]),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-c", CALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert set(done.stdout.split()) == found
    assert not HEAVY & set(done.stderr.split())


def test_moved_data_is_fetched_only_into_a_folder_without_its_own(tmp_path):
    recipe = load_recipe(write_minimal_recipe(tmp_path), ["data.remote=ram://bucket/moved"])
    data = tmp_path / "moved"
    assert with_data(recipe, data).data.remote == "ram://bucket/moved"
    with_data(recipe, data).data.folder(recipe.data.sources[0].name).mkdir(parents=True)
    moved = with_data(recipe, data).data
    assert (moved.path, moved.remote) == (data, None)
