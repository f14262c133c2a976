"""`launch/gpu_check.sh` at toy size, which needs no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("env", "tests", "layer", "throughput", "decode", "trace")


def check(out: Path, *stages: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OUT": str(out), "PATH": path, "PYTHONPATH": str(ROOT)} | variables
    command = ["bash", "launch/gpu_check.sh", *stages]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def stand_in(folder: Path, content: str) -> str:
    """Write a program `moma` for bash; return a `PATH` on which it comes first."""
    moma = folder / "moma"
    moma.write_text(f"#!/bin/bash\n{content}\n")
    moma.chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_a_stage_leaves_json_and_a_log(tmp_path):
    result = check(tmp_path, "env", TOY="1")
    assert result.returncode == 0 and result.stdout.startswith("env: done in")
    assert json.loads((tmp_path / "env.json").read_text())["torch"]
    assert (tmp_path / "env.log").is_file()


def test_a_stage_goes_on_after_its_last_part(tmp_path):
    """Only the order of the parts is tested, so that a stand-in for `moma` prints the results."""
    calls, out = tmp_path / "calls", tmp_path / "out"

    def call(command: str) -> list[str]:
        path = stand_in(tmp_path, f'echo "$4" >> {calls}\n{command}')
        calls.write_text("")
        result = check(out, "layer", TOY="1", PATH=path)
        assert result.returncode == ("exit" in command), result.stderr
        return calls.read_text().split()

    assert call('[ "$4" = 32 ] && echo "[$4]" || exit 2') == ["32", "64"]
    stale = out / "parts" / "layer-0123456789abcdef.json"  # of other code
    stale.write_text("[0]")
    assert call('echo "[$4]"') == ["64"]
    assert json.loads((out / "layer.json").read_text()) == [[32], [64]]
    assert not stale.exists()
    assert call('echo "[$4]"') == ["32", "64"]  # all parts are measured anew


def test_unknown_stages_are_refused(tmp_path):
    result = check(tmp_path, "env", "speed", TOY="1")
    assert result.returncode == 2 and "no stage 'speed'; use env tests" in result.stderr
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_only_the_toy_size_runs(tmp_path):
    result = check(tmp_path, "env", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2 and "set TOY=1" in result.stderr


def test_a_stage_that_fails_is_reported(tmp_path):
    path = stand_in(tmp_path, 'echo "refused: $*" >&2; exit 2')
    result = check(tmp_path, "decode", TOY="1", PATH=path)
    assert result.returncode == 1 and f"see {tmp_path}/decode.log" in result.stderr
    assert json.loads((tmp_path / "decode.json").read_text()) == {"exit_code": 2}
    log = (tmp_path / "decode.log").read_text()
    assert "refused: prepare " in log and f"data.path={tmp_path}/data" in log


def test_the_decode_stage_generates_text_and_images(trained, tmp_path, monkeypatch, capsys):
    """Its program alone, with a run that exists."""
    script = (ROOT / "launch" / "gpu_check.sh").read_text()
    program = re.search(r"stage_decode\(\).*?<< 'END'\n(.*?)\nEND\n", script, re.DOTALL)
    assert program is not None
    bench = tmp_path / "generation.json"
    bench.write_text("[]")
    monkeypatch.setattr(sys, "argv", ["-", str(trained / "run"), str(bench)])
    exec(program[1], {})
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == [] and [row["batch"] for row in found["run"]] == [1, 8]
    assert all(row["tokens_per_second"] > 0 for row in found["run"])


@pytest.mark.slow
def test_all_stages_run_at_toy_size(tmp_path):
    result = check(tmp_path, TOY="1")
    assert result.returncode == 0, result.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in STAGES}
    assert found["tests"]["failures"] == found["tests"]["errors"] == 0 < found["tests"]["tests"]
    assert {row["name"] for row in found["throughput"][0]} == {"dense", "moe_4t4i"}
    for rows in (found["decode"]["run"], found["decode"]["bench"]):
        assert rows and all(row["tokens_per_second"] > 0 for row in rows)
    assert found["trace"]["traces"] and found["trace"]["last_record"]["step"] == 4
