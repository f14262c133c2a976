"""The Slurm script with stand-ins for Slurm's own programs: which exit code leads where."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "slurm.sbatch"
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node1; else echo "$@" >> "$FOUND/requeued"; fi
"""
SRUN = """#!/bin/bash
echo "$MASTER_ADDR $WORLD_SIZE" > "$FOUND/started"
while [ ! -e "$FOUND/end" ]; do sleep 0.02; done
exit $(cat "$FOUND/end")
"""


@pytest.fixture
def start(tmp_path):
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(code: int, restarts: int = 0) -> subprocess.Popen[str]:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16"}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOUND": str(tmp_path)}
        environment = os.environ | slurm | path | {"SLURM_RESTART_COUNT": str(restarts)}
        process = subprocess.Popen(
            ["bash", str(SCRIPT), "my.toml"], env=environment, stderr=subprocess.PIPE, text=True
        )
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # as when the job is preempted
        time.sleep(0.1)
        (tmp_path / "end").write_text(str(code))
        return process

    return run


@pytest.mark.parametrize(
    ("code", "restarts", "requeued", "left_with"),
    [
        (0, 0, False, 0),
        (2, 0, False, 2),
        (75, 0, True, 0),
        (75, 99, True, 0),
        (137, 19, True, 0),
        (137, 20, False, 137),
    ],
)
def test_exit_codes(start, tmp_path, code, restarts, requeued, left_with):
    process = start(code, restarts)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == left_with
    assert (tmp_path / "requeued").exists() == requeued
    assert ("gave up" in errors) == (left_with == 137)
    assert (tmp_path / "started").read_text() == "node1 16\n"
