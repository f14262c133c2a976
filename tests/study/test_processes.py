"""Processes that train the runs of a study."""

import logging
import os
import signal
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moma.errors import StoppedError, UserError
from moma.study import processes
from moma.study.grid import read_study
from moma.study.processes import run_in_processes, run_study
from tests.command_line import refuses
from tests.factories import write_study
from tests.processes import forked
from tests.ray_nodes import two_nodes

DENSE = {"name": "dense", "model": {"groups": "dense"}}
SPARSE = {"name": "sparse", "model": {"groups": "moe_2t2i"}}


def describe_process() -> tuple[bool, int, bool]:
    names = [thread.name for thread in threading.enumerate()]
    propagates = logging.getLogger("moma").propagate
    return propagates, torch.get_num_threads(), "exit with parent" in names


def test_a_training_process_has_its_threads_messages_and_end():
    """It prints messages as the command line does, and ends with a command that is killed."""
    with forked():
        assert run_in_processes([describe_process], 3, lambda: None) == [(False, 3, True)]


def test_a_missing_ray_cluster_is_reported(tiny, tmp_path):
    pytest.importorskip("ray")
    file = write_study(tiny, tmp_path, {"seeds": [0], "variants": [DENSE]})
    assert "no Ray cluster there" in refuses("study", file, "--ray", "127.0.0.1:1")


class FakeRay:
    """Runs tasks in threads of this process; `error` is raised instead, if there is one."""

    def __init__(self, error: Exception | None = None):
        self.exceptions = SimpleNamespace(RayTaskError=FakeTaskError, RayError=FakeRayError)
        self.error = error
        self.options: dict[str, object] = {}
        self.is_connected = True

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **options):
        self.options = options
        return lambda function: SimpleNamespace(remote=partial(self._submit, function))

    def _submit(self, function, *arguments):
        future: Future[object] = Future()
        if self.error is None:
            future.set_result(function(*arguments))
        else:
            future.set_exception(self.error)
        return SimpleNamespace(future=lambda: future)

    def shutdown(self):
        self.is_connected = False


class FakeRayError(Exception):
    pass


class FakeTaskError(FakeRayError):
    def __init__(self, cause):
        super().__init__("a traceback of many lines")
        self.cause = cause


def run_on(ray, monkeypatch, study):
    monkeypatch.setattr(processes, "connect_to_ray", lambda address, **options: ray)
    try:
        return run_study(study, ray="auto", quiet=True)
    finally:
        assert not ray.is_connected


@pytest.fixture
def study(tiny, tmp_path):
    file = write_study(tiny, tmp_path, {"seeds": [0], "variants": [DENSE], "batches": 1})
    return read_study(file, ["pretrain.steps=2", "pretrain.checkpoint_every=2"])


def test_runs_are_trained_in_tasks_of_a_core_each(study, monkeypatch):
    ray = FakeRay()
    assert run_on(ray, monkeypatch, study) == {}
    assert [run.read_result() is None for run in study.runs] == [False]
    assert ray.options["num_cpus"] == 1 and "num_gpus" not in ray.options
    assert ray.options["retry_exceptions"] == [StoppedError]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FakeTaskError(UserError("no such data")), "^no such data$"),
        (FakeRayError("node died\nmore"), r"--ray auto: .*last checkpoint \(Ray: node died\)$"),
    ],
)
def test_errors_of_a_cluster_are_described(study, monkeypatch, error, message):
    with pytest.raises(UserError, match=message):
        run_on(FakeRay(error), monkeypatch, study)


def test_a_folder_that_a_machine_lacks_is_named(study, monkeypatch, tmp_path):
    monkeypatch.setattr("os.getcwd", lambda: str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"missing: cannot be entered on .* share"):
        run_on(FakeRay(), monkeypatch, study)


def _stop_training(folder: Path, stopped: list[int]) -> None:
    """Stop a process of the cluster once a run has a checkpoint, and soon after kill one."""
    while not [*folder.glob("*/checkpoints/*/manifest.json")]:
        time.sleep(0.05)
    for kind in (signal.SIGTERM, signal.SIGKILL):
        while not (workers := _workers()):
            time.sleep(0.05)
        os.kill(workers[0], kind)
        stopped.append(kind)
        time.sleep(3)


def _workers() -> list[int]:
    """The processes that train runs on a Ray cluster of this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if b"ray::_train_on_ray" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.slow
def test_a_ray_cluster_measures_the_same_although_processes_are_stopped(
    tiny, tmp_path, tmp_path_factory
):
    losses, stopped = {}, list[int]()
    for name in ("here", "ray"):
        (tmp_path / name).mkdir()
        file = write_study(tiny, tmp_path / name, {"seeds": [0, 1], "variants": [DENSE, SPARSE]})
        study = read_study(file, ["pretrain.steps=200", "pretrain.checkpoint_every=4"])
        if name == "here":
            assert not run_study(study, 1, quiet=True)
        else:
            threading.Thread(target=_stop_training, args=(study.path, stopped), daemon=True).start()
            with two_nodes(tmp_path_factory.mktemp("ray")) as address:
                assert not run_study(study, ray=address, quiet=True)
        results = {run.name: run.read_result() for run in study.runs}
        losses[name] = {run: result and result["measures"] for run, result in results.items()}
    assert len(losses["here"]) == 4 and losses["here"] == losses["ray"]
    assert stopped == [signal.SIGTERM, signal.SIGKILL]
