"""Processes that train the runs of a study."""

import os
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

import pytest

from moma.study.grid import read_study
from moma.study.processes import run_in_processes, run_study
from tests.command_line import refuses
from tests.factories import write_study
from tests.ray_nodes import two_nodes

DENSE = {"name": "dense", "model": {"groups": "dense"}}
SPARSE = {"name": "sparse", "model": {"groups": "moe_2t2i"}}


def test_a_training_process_prints_messages_as_the_command_line_does():
    job = partial(eval, "__import__('logging').getLogger('moma').propagate")
    assert run_in_processes([job], 1, lambda: None) == [False]


def test_a_missing_ray_cluster_is_reported(tiny, tmp_path):
    pytest.importorskip("ray")
    file = write_study(tiny, tmp_path, {"seeds": [0], "variants": [DENSE]})
    assert "no Ray cluster there" in refuses("study", file, "--ray", "127.0.0.1:1")


def _kill_training(folder: Path, killed: list[int]) -> None:
    """Kill a process of the cluster, once a run has a checkpoint."""
    while not [*folder.glob("*/checkpoints/*/manifest.json")]:
        time.sleep(0.05)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if b"ray::_work_on_ray" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(int(process.name))
                return


@pytest.mark.slow
def test_a_ray_cluster_measures_the_same_although_a_process_is_killed(
    tiny, tmp_path, tmp_path_factory
):
    losses, killed = {}, list[int]()
    for name in ("here", "ray"):
        (tmp_path / name).mkdir()
        file = write_study(tiny, tmp_path / name, {"seeds": [0, 1], "variants": [DENSE, SPARSE]})
        study = read_study(file, ["pretrain.steps=60", "pretrain.checkpoint_every=4"])
        if name == "here":
            assert not run_study(study, 1, quiet=True)
        else:
            Thread(target=_kill_training, args=(study.path, killed), daemon=True).start()
            with two_nodes(tmp_path_factory.mktemp("ray")) as address:
                assert not run_study(study, ray=address, quiet=True)
        results = {run.name: run.read_result() for run in study.runs}
        losses[name] = {run: result and result["measures"] for run, result in results.items()}
    assert len(losses["here"]) == 4 and losses["here"] == losses["ray"] and killed
