"""Errors of one of two ranks: both stop with the same message, or one reports the other's end."""

import errno
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import Batch
from moma.errors import LostRankError, SharedError, SharedStorageError, StorageError
from moma.files import atomic_write
from moma.runs import Run
from moma.runtime import writer
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.tracking import MetricsLog
from moma.runtime.world import World
from moma.train import stages
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.replay import replay
from moma.train.step import LossFunction
from tests.processes import FORKSERVER, on_ranks, run_rank
from tests.train.test_fault import exploding

Job = Callable[[World, Recipe], None]


def full_disk(self: MetricsLog, record: dict) -> None:
    if record["step"] == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    raise AssertionError("no record may follow one that could not be written")


def with_nonfinite_logit(real: LossFunction) -> LossFunction:
    """A score of the second layer is not finite at the third step."""
    taken = 0

    def loss_function(*arguments):
        nonlocal taken
        taken += 1
        losses = real(*arguments)
        return losses._replace(nonfinite_L=torch.tensor([False, taken == 3]))

    return loss_function


def with_kill(real: LossFunction) -> LossFunction:
    """The process is killed in its third step."""
    taken = 0

    def loss_function(*arguments):
        nonlocal taken
        taken += 1
        if taken == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    return loss_function


def job_of_killed(world: World, recipe: Recipe) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            real = stages.loss_function_of
            patch.setattr(
                stages, "loss_function_of", lambda *each, **keys: with_kill(real(*each, **keys))
            )
        train(recipe, world, quiet=True)


def job_without_data(world: World, recipe: Recipe) -> None:
    """Rank 1 cannot read its data for the third step."""
    real, taken = Batches.__next__, 0

    def fail_at_third(self: Batches) -> Batch:
        nonlocal taken
        taken += 1
        if taken == 3:
            raise StorageError("no network")
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(Batches, "__next__", fail_at_third)
        train(recipe, world, quiet=True)


def run_and_report(rank: int, port: int, job: Job, recipe: Recipe, out: Path) -> None:
    try:
        run_rank(rank, 2, port, job, recipe)
    except (LostRankError, StorageError) as error:  # it has left the job
        (out / f"{type(error).__name__}-{rank}").write_text(str(error))


def slow_write(path: Path, text: str) -> None:
    time.sleep(0.3)
    atomic_write(path, text)


def write_fault_of_three_ranks(out: Path) -> None:
    shutil.copytree(out / "exploding", out / "three")
    path = out / "three/fault/fault.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"world_size": 3}))


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

            def faulty(*arguments: Any, **keys: Any) -> LossFunction:
                return with_nonfinite_logit(real(*arguments, **keys))

            patch.setattr(stages, "loss_function_of", faulty)
        with pytest.raises(SharedError) as fault:
            changes = {"run": out / "fault", "pretrain": stage}
            train(tiny.model_copy(update=changes), world, quiet=True)
    (out / f"fault-{world.rank}").write_text(str(fault.value))
    with pytest.raises(SharedError, match="explodes"):
        train(exploding(tiny, out / "exploding"), world, quiet=True)
    found = replay(Run(out / "exploding"), world, quiet=True)
    (out / f"replay-{world.rank}.json").write_text(json.dumps(found))
    if world.rank == 0:
        write_fault_of_three_ranks(out)
    world.barrier()
    with pytest.raises(SharedError, match="2 ranks cannot replay the steps of 3; use a divisor"):
        replay(Run(out / "three"), world, quiet=True)
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


def test_a_nonfinite_logit_stops_all_ranks(outcome):
    message = (outcome / "fault-0").read_text()
    assert "at step 3 the output of layer 1, or a logit" in message
    assert (outcome / "fault-1").read_text() == message
    files = {path.name for path in (outcome / "fault" / "fault").iterdir()}
    ranks = {f"rank-{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")}
    assert files == {"fault.json"} | ranks


def test_two_ranks_and_one_process_replay_the_same(outcome):
    found, same = (json.loads((outcome / f"replay-{rank}.json").read_text()) for rank in range(2))
    assert found == same and found["same_batches"]
    assert [batch["rank"] for batch in found["micro_batches"]] == [0, 1]
    alone = replay(Run(outcome / "exploding"), World(torch.device("cpu")), quiet=True)
    for key in ("loss_before", "gradient_norm", "gradients"):  # of diverging weights
        assert found.pop(key) == pytest.approx(alone.pop(key), rel=1e-2)
    for own, other in zip(found.pop("micro_batches"), alone.pop("micro_batches"), strict=True):
        assert own.pop("loss_text") == pytest.approx(other.pop("loss_text"), rel=1e-3)
        assert own.pop("loss_image") == pytest.approx(other.pop("loss_image"), rel=1e-3)
        assert own == other
    assert found == alone


def test_a_checkpoint_may_be_late_on_one_rank(outcome):
    run = Run(outcome / "slow")
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
    assert checkpoints_in(run.checkpoints)[-1].name == "step-00000003"


def stop_after_a_sum(world: World) -> None:
    world.sum(torch.ones(1, device=world.device))
    raise SharedError("stopped")


@pytest.mark.gpu
def test_an_error_ends_a_job_with_groups_of_nccl_and_gloo():
    with pytest.raises(multiprocessing.ProcessRaisedException, match="SharedError: stopped"):
        on_ranks(1, stop_after_a_sum)


@pytest.mark.parametrize(
    ("job_of_lost", "code", "own_error"),
    [
        (job_of_killed, -signal.SIGKILL, None),
        pytest.param(job_without_data, 0, "no network", marks=pytest.mark.slow),
    ],
)
def test_the_end_of_a_rank_is_reported_and_not_waited_for(
    tiny, tmp_path, job_of_lost, code, own_error
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stage = tiny.pretrain.model_copy(update={"log_every": 1, "checkpoint_every": 1})
    recipe = tiny.model_copy(update={"run": tmp_path / "run", "pretrain": stage})
    ranks = [
        FORKSERVER.Process(target=run_and_report, args=(rank, port, job_of_lost, recipe, tmp_path))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)  # less than the default timeout of ranks
    assert [process.exitcode for process in ranks] == [0, code]
    message = (tmp_path / "LostRankError-0").read_text()
    assert message.startswith("rank 0 of 2: lost rank 1 (") and "restart the job" in message
    if own_error is not None:
        assert (tmp_path / "StorageError-1").read_text() == own_error
    saved = [path.name for path in checkpoints_in(Run(recipe.run).checkpoints)]
    assert saved and max(saved) <= "step-00000002"
