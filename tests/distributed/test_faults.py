"""Errors of one of two ranks: both ranks stop with the same message."""

import errno
import time
from pathlib import Path

import pytest
import torch

from moma.errors import SharedError, SharedStorageError
from moma.files import atomic_write
from moma.runs import Run
from moma.runtime import writer
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.tracking import MetricsLog
from moma.runtime.world import World
from moma.train import stages
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.step import LossFunction
from tests.processes import on_ranks


def full_disk(self: MetricsLog, record: dict) -> None:
    if record["step"] == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    raise AssertionError("no record may follow one that could not be written")


def with_nonfinite_score(real: LossFunction) -> LossFunction:
    """A score of the second layer is not finite at the third step."""
    taken = 0

    def loss_function(*arguments):
        nonlocal taken
        taken += 1
        losses = real(*arguments)
        return losses._replace(nonfinite_L=torch.tensor([False, taken == 3]))

    return loss_function


def slow_write(path: Path, text: str) -> None:
    time.sleep(0.3)
    atomic_write(path, text)


def job(world: World, tiny: Recipe, out: Path) -> None:
    stage = tiny.pretrain.model_copy(update={"log_every": 1})
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 0:
            patch.setattr(MetricsLog, "write", full_disk)
        with pytest.raises(SharedStorageError) as full:
            train(tiny.model_copy(update={"run": out / "full"}), world, quiet=True)
    (out / f"full-{world.rank}").write_text(str(full.value))
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            real = stages.loss_function_of
            faulty = lambda *arguments: with_nonfinite_score(real(*arguments))  # noqa: E731
            patch.setattr(stages, "loss_function_of", faulty)
        with pytest.raises(SharedError) as fault:
            changes = {"run": out / "fault", "pretrain": stage}
            train(tiny.model_copy(update=changes), world, quiet=True)
    (out / f"fault-{world.rank}").write_text(str(fault.value))
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 0:
            patch.setattr(writer, "atomic_write", slow_write)
        often = stage.model_copy(update={"checkpoint_every": 1, "steps": 3})
        changes = {"run": out / "slow", "pretrain": often}
        train(tiny.model_copy(update=changes), world, quiet=True)


@pytest.fixture(scope="module")
def outcome(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("outcome")
    on_ranks(2, job, tiny, out)
    return out


def test_an_unwritable_log_stops_all_ranks(outcome):
    assert "metrics.jsonl: cannot write (No space left" in (outcome / "full-0").read_text()
    assert (outcome / "full-1").is_file()
    assert not checkpoints_in(Run(outcome / "full").checkpoints)


def test_a_nonfinite_score_stops_all_ranks(outcome):
    message = (outcome / "fault-0").read_text()
    assert "at step 3 the output of layer 1, or a score" in message
    assert (outcome / "fault-1").read_text() == message
    files = {path.name for path in (outcome / "fault" / "fault").iterdir()}
    ranks = {f"rank-{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")}
    assert files == {"fault.json"} | ranks


def test_a_checkpoint_may_be_late_on_one_rank(outcome):
    run = Run(outcome / "slow")
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
    assert checkpoints_in(run.checkpoints)[-1].name == "step-00000003"
