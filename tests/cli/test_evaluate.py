"""`moma evaluate --suite`: what is printed, and what is refused."""

import json
from typing import get_args

import pytest

from moma.cli.evaluate import SuiteName
from moma.evaluate.suite import SUITES
from tests.command_line import refuses, succeeds


def test_suite_as_table_markdown_and_json(trained, tmp_path):
    pages = tmp_path / "pages.jsonl"
    pages.write_text('{"segments": [{"type": "text", "text": "red green"}]}\n')
    call = ("evaluate", trained / "run", "--suite", "perplexity", "--from", pages)
    result = json.loads(succeeds(*call, "--json"))
    assert (result["suite"], result["routing"]) == ("perplexity", "causal")
    row = result["sources"]["interleaved"]
    assert row["documents"] == 1 and row["perplexity"]["value"] > 1
    value = f"{row['perplexity']['value']:,.4g}"
    head, line, *rows = succeeds(*call, "--markdown").splitlines()
    assert head.startswith("| source | documents | perplexity |")
    assert line == "|---" * head.count(" |") + "|"
    assert rows[1].startswith(f"| interleaved | 1 | {value} ({value} – {value}) |")
    table = succeeds(*call)
    assert value in table and "95% intervals" in table and "perplexity, causal" in table


def test_every_suite_can_be_named():
    assert [*SUITES] == [*get_args(SuiteName)]


def test_suite_evaluates_what_is_held_out(trained):
    call = ("evaluate", trained / "run", "--suite", "captions")
    result = json.loads(succeeds(*call, "--routing", "choice", "--json"))
    assert result["routing"] == "choice" and [*result["sources"]] == ["all", "captions"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "a"], "--from: no effect without --suite"),
        (["--markdown"], "--markdown: no effect without --suite"),
        (["--suite", "perplexity", "--json", "--markdown"], "--json and --markdown: choose one"),
        (["--suite", "captions", "--weights", "a"], "--weights: no effect without"),
        (["--suite", "reconstruction", "--routing", "choice"], "--routing: no effect on recon"),
        (["--suite", "clip_score", "--weights", "missing"], "cannot load the CLIP model missing"),
        (["--suite", "multiple_choice"], "needs --from"),
        (["--suite", "perplexity", "--from", "missing.jsonl"], "missing.jsonl"),
        (["--suite", "captions", "--from", "missing.toml"], "missing.toml"),
    ],
)
def test_refuses_suites(trained, options, message):
    assert message in refuses("evaluate", trained / "run", *options)
