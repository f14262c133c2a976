"""Results are printed completely on any terminal, pipe or file, with any characters."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moma.cli import main
from moma.cli.output import key_values, print_result
from moma.progress import show_progress
from moma.study.tables import Table
from tests.processes import FORKSERVER

ROOT = Path(__file__).parents[2]
MAIN = "from moma.cli import main; main()"
LONG = "x" * 200
TABLE = Table(
    "title [v2] :smile:", "caption [red]", ("[bold]run", "loss"), [(f"[v2]{LONG}", 0.12345)]
)


def call(*arguments: object, pipe: str = "", **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", MAIN, *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", f'"$@" {pipe}', "bash", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_brackets_and_colons_are_printed_as_they_are(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # as in a pipe; parallel test processes set it
    print_result({}, False, [TABLE], ["[end]"])
    out = capsys.readouterr().out
    for text in ("title [v2] :smile:", "caption [red]", "[bold]run", f"[v2]{LONG}", "0.1235"):
        assert text in out
    assert out.endswith("[end]\n")


def test_a_narrow_terminal_loses_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    print_result({}, False, [TABLE])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 30
    assert out.count("x") == len(LONG) and "…" not in out


@pytest.mark.parametrize("columns", ["0", "1", "-3", "wide"])
def test_an_impossible_width_loses_nothing(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    print_result({}, False, [TABLE])
    out = capsys.readouterr().out
    assert out.count("x") == len(LONG) and "…" not in out and "0.1235" in out


def test_json_is_one_value_and_nothing_else(capsys):
    print_result({"é": [1, None]}, True, [TABLE], ["line"])
    assert json.loads(capsys.readouterr().out) == {"é": [1, None]}


def test_nested_results_are_rows_of_dotted_keys():
    assert key_values("t", {"a": {"b": 1, "c": None}, "d": 2}).rows == [
        ("a.b", 1),
        ("a.c", None),
        ("d", 2),
    ]


def test_progress_shows_brackets(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    with show_progress("train [v2]", 2) as report:
        report(1, "loss [a]")
    err = capsys.readouterr().err
    assert "train [v2]" in err and "loss [a]" in err


@pytest.mark.parametrize("words", [["plan"], ["plan", "--json"]])
def test_characters_missing_from_the_encoding_are_escaped(tmp_path, monkeypatch, words):
    recipe = tmp_path / "é–.toml"
    recipe.write_bytes((ROOT / "configs" / "demo.toml").read_bytes())
    verb, *options = words
    code, out, err = call_with_ascii(monkeypatch, verb, recipe, *options)
    assert (code, err) == (0, "") and "parameters" in out
    code, out, err = call_with_ascii(monkeypatch, verb, tmp_path / "ü.toml")
    assert (code, out) == (2, "") and "\\xfc.toml" in err


def call_with_ascii(monkeypatch, *arguments):
    """Exit code, standard output and standard error, which encode only ASCII."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("sys.stdout", streams[0])
        patch.setattr("sys.stderr", streams[1])
        patch.setattr("sys.argv", ["moma", *map(str, arguments)])
        main()
    for stream in streams:
        stream.flush()
    return stop.value.code, *(stream.buffer.getvalue().decode("ascii") for stream in streams)


def test_a_process_with_ascii_output_gives_no_traceback(tmp_path):
    refused = call("plan", tmp_path / "ü.toml", PYTHONIOENCODING="ascii")
    assert refused.returncode == 2 and "\\xfc.toml" in refused.stderr


def print_schema_to_nobody(errors: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w")
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["moma", "schema"]
    main()


def test_a_closed_output_gives_no_traceback(monkeypatch, tmp_path):
    process = FORKSERVER.Process(target=print_schema_to_nobody, args=[tmp_path / "errors"])
    process.start()
    process.join()
    assert process.exitcode == 141 and (tmp_path / "errors").read_text() == ""
    monkeypatch.setattr("sys.stdout", None)  # as Python starts with `>&-`
    monkeypatch.setattr("sys.argv", ["moma", "schema"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_output_is_one_message(unbuffered):
    full = call("--version", pipe="> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert full.returncode == 74 and full.stderr.count("\n") == 1
    assert "No space left" in full.stderr
