"""What goes wrong on one of two ranks alone: both leave alike, and say the same."""

import errno
import time
from pathlib import Path

import pytest
import torch

from moma.errors import SharedError, SharedStorageError
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.tracking import MetricsLog
from moma.runtime.world import World
from moma.runtime.writer import CheckpointWriter
from moma.train import stages
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.step import Objective
from tests.distributed.ranks import on_ranks

FINISH = CheckpointWriter._finish


def full_disk(self: MetricsLog, row: dict) -> None:
    if row["step"] == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    raise AssertionError("after a row that could not be written none is tried")


def sick(real: Objective) -> Objective:
    """A score of the second layer is not finite at the third step."""
    taken = 0

    def objective(*arguments):
        nonlocal taken
        taken += 1
        losses = real(*arguments)
        return losses._replace(nonfinite_L=torch.tensor([False, taken == 3]))

    return objective


def slow_disk(self: CheckpointWriter, *arguments) -> str | None:
    """One rank's files are late, while the others tell each other theirs."""
    time.sleep(0.3)
    return FINISH(self, *arguments)


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
            of = stages.objective_of
            patch.setattr(stages, "objective_of", lambda *arguments: sick(of(*arguments)))
        with pytest.raises(SharedError) as fault:
            changes = {"run": out / "fault", "pretrain": stage}
            train(tiny.model_copy(update=changes), world, quiet=True)
    (out / f"fault-{world.rank}").write_text(str(fault.value))
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 0:
            patch.setattr(CheckpointWriter, "_finish", slow_disk)
        often = stage.model_copy(update={"checkpoint_every": 1})
        changes = {"run": out / "slow", "pretrain": often}
        train(tiny.model_copy(update=changes), world, quiet=True)


@pytest.fixture(scope="module")
def left(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("left")
    on_ranks(2, job, tiny, out)
    return out


def test_a_log_that_cannot_be_written(left):
    assert "metrics.jsonl: cannot write (No space left" in (left / "full-0").read_text()
    assert (left / "full-1").is_file()
    assert not checkpoints_in(Run(left / "full").checkpoints)


def test_a_score_that_is_not_finite(left):
    told = (left / "fault-0").read_text()
    assert "at step 3 the output of layer 1, or a score" in told
    assert (left / "fault-1").read_text() == told
    files = {path.name for path in (left / "fault" / "fault").iterdir()}
    ranks = {f"rank-{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")}
    assert files == {"fault.json"} | ranks


def test_a_checkpoint_that_is_late_on_one_rank(left):
    run = Run(left / "slow")
    assert [row["step"] for row in run.read_metrics()] == list(range(1, 9))
    assert checkpoints_in(run.checkpoints)[-1].name == "step-00000008"
