"""Log records: those kept when a run resumes, and the message for a full disk."""

import json
from contextlib import closing

import pytest

from moma.errors import StorageError, UserError
from moma.runs import Run
from moma.runtime.tracking import MetricsLog, Trackers, TrackingConfig, make_trackers
from tests.runtime.disk import largest_file


def record(step: int) -> dict:
    return {"step": step, "loss": 0.1 * step, "routers": {"0.text": {"min_score": 0.5}}}


def write(run: Run, *steps: int, after: int = 0) -> None:
    log = MetricsLog(run, after)
    for step in steps:
        log.write(record(step))
    log.sync()
    log.close()


def test_records_after_the_checkpoint_are_replaced(tmp_path):
    run = Run(tmp_path)
    write(run, 2, 4, 6)
    write(run, 6, 8, after=4)
    assert run.read_metrics() == [record(step) for step in (2, 4, 6, 8)]
    assert run.last_metric() == record(8)
    write(run, 7, after=7)  # the checkpoint of a step without a record
    assert run.read_metrics() == [record(step) for step in (2, 4, 6, 7)]
    write(run, 2)
    assert run.read_metrics() == [record(2)]


def test_records_damaged_by_a_power_cut_are_dropped(tmp_path):
    """The log was synced before the checkpoint; later records may be damaged."""
    run = Run(tmp_path)
    write(run, 2, 4)
    with run.metrics.open("ab") as file:
        file.write(b"\0" * 20 + b"\n" + json.dumps(record(8)).encode() + b"\n")
    write(run, 6, after=4)
    assert run.read_metrics() == [record(step) for step in (2, 4, 6)]


def test_a_damaged_record_before_the_checkpoint_is_named(tmp_path):
    run = Run(tmp_path)
    run.metrics.write_text(f"{json.dumps(record(2))}\nnonsense\n{json.dumps(record(6))}\n")
    with pytest.raises(UserError, match="record 2: not valid JSON"):
        MetricsLog(run, 6)
    assert len(run.metrics.read_text().splitlines()) == 3


def test_the_last_record_of_a_growing_log(tmp_path):
    run = Run(tmp_path)
    assert run.last_metric() is None
    run.metrics.write_text('{"step": 1')
    assert run.last_metric() is None
    long = [record(step) | {"text": "x" * 5000} for step in range(300)]
    run.metrics.write_text("".join(json.dumps(each) + "\n" for each in long) + '{"st')
    assert run.last_metric() == long[-1]


def test_a_full_disk_is_reported(tmp_path):
    run = Run(tmp_path)
    trackers = Trackers(MetricsLog(run, 0))
    trackers.write(record(2))
    with largest_file(run.metrics.stat().st_size + 5):
        trackers.write(record(4))
        assert trackers.error is not None
        with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot write \(.*check the disk"):
            trackers.sync()
        trackers.close()
    write(run, 4, after=2)
    assert run.read_metrics() == [record(2), record(4)]


def test_wandb_runs_of_equal_names_have_different_ids(tmp_path, monkeypatch):
    """Every run's routers are in a folder `aux_router`; a resumed run keeps its id."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for name in ("a", "b", "a"):
        run = Run(tmp_path / name / "aux_router")
        run.path.mkdir(parents=True, exist_ok=True)
        config = TrackingConfig(tensorboard=False, wandb_project="moma")
        with closing(make_trackers(config, run, 0)) as trackers:
            trackers.write(record(2))
            trackers.sync()
        folders = sorted((run.path / "wandb").glob("offline-run-*"))
        ids.append(folders[-1].name.rpartition("-")[2])
    assert ids[0] == ids[2] != ids[1]
