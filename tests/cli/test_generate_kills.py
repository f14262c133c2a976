"""`moma generate --from` killed for real, and on two ranks: nothing is lost or doubled."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import succeeds
from tests.processes import Command

ROOT, COUNT = Path(__file__).parents[2], 40


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"segments": [{"type": "text", "text": f"box {number}"}]} for number in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def arguments(trained, prompts):
    options = ("--mode", "image", "--batch", "2")
    return ("generate", trained / "run", "--from", prompts, *options)


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    succeeds(*arguments, "--out", out)
    return contents(out)


def contents(out):
    """Results and images, by name."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".json"}


@pytest.mark.slow
def test_a_killed_command_goes_on(arguments, expected, tmp_path):
    out, part = tmp_path / "out", tmp_path / "out" / "part-0.jsonl"
    for answers in (1, COUNT // 2):
        process = Command(tmp_path, *arguments, "--out", out)
        while process.poll() is None and not (
            part.exists() and part.read_bytes().count(b"\n") >= answers
        ):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it had already ended: use more prompts"
        assert not (out / "results.jsonl").exists()
    succeeds(*arguments, "--out", out)
    assert contents(out) == expected


@pytest.mark.slow
def test_two_ranks_under_torchrun_share_the_prompts(arguments, expected, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "moma", *map(str, arguments)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see docs/train.md
    }
    subprocess.run([*command, "--out", str(tmp_path / "out")], env=environment, check=True)
    assert contents(tmp_path / "out") == expected
