"""Checkpoints: complete or not used, written in the background, kept as configured."""

import logging
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW

from moma.errors import StorageError, UserError
from moma.runtime import writer as writing
from moma.runtime.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    load_model,
    newest_intact,
    read_rank_states,
    read_state,
    restore_random_state,
    save_weights,
    set_aside,
    stored_weights,
    training_tensors,
)
from moma.runtime.weights import Weights
from moma.runtime.world import World
from moma.runtime.writer import CheckpointWriter
from tests.runtime.disk import largest_file

WORLD = World(torch.device("cpu"))


def make(seed: int = 0) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(6, 5)
    optimizer = AdamW(model.parameters(), fused=True)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, *steps: int, **options) -> None:
    with closing(CheckpointWriter(folder, WORLD, **options)) as writer:
        for step in steps:
            writer.save(step, training_tensors(*make(step)), {"step": step}, {"data": [step]})
        writer.wait()


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder)]


def test_a_checkpoint_restores_everything(tmp_path):
    model, optimizer = make()
    with closing(CheckpointWriter(tmp_path, WORLD)) as writer:
        writer.save(7, training_tensors(model, optimizer), {"step": 7}, {"data": [1, 2]})
        drawn = torch.rand(3)
        expected = [p.detach().clone() for p in model.parameters()]
        moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
        with torch.no_grad():  # later changes must not be saved
            for parameter in model.parameters():
                parameter.add_(1)
                optimizer.state[parameter]["exp_avg"].add_(1)
        writer.wait()
    path, damaged = newest_intact(tmp_path, WORLD)
    assert path is not None and path.name == "step-00000007" and not damaged
    again, other = make(1)
    load_checkpoint(path, again, other, WORLD)
    for parameter, value in zip(again.parameters(), expected, strict=True):
        assert torch.equal(parameter, value)
    for parameter, value in zip(again.parameters(), moments, strict=True):
        assert torch.equal(other.state[parameter]["exp_avg"], value)
    (rank_state,) = read_rank_states(path)
    assert rank_state["data"] == [1, 2] and read_state(path) == {"step": 7, "world_size": 1}
    restore_random_state(rank_state)
    assert torch.equal(torch.rand(3), drawn)
    assert (tmp_path / "latest").read_text() == f"{path.name}\n"


def test_a_plan_is_made_again_only_for_other_tensors(tmp_path):
    def saved(step: int, model: nn.Module) -> bool:
        """Save and read the weights back; returns whether the plan was reused."""
        messages.clear()
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        with closing(CheckpointWriter(tmp_path, WORLD)) as writer:
            writer.save(step, tensors, {"step": step}, {})
            writer.wait()
        stored = stored_weights(checkpoints_in(tmp_path)[-1])
        assert stored.meta_tensors.keys() == model.state_dict().keys()
        for name, value in stored.read(stored.meta_tensors).items():
            assert torch.equal(value, model.state_dict()[name])
        return any("No change in the local plan" in message for message in messages)

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    reused = [saved(step, nn.Linear(3, 1 + step // 3)) for step in range(1, 5)]
    logger.removeHandler(handler)
    logger.setLevel(level)
    assert reused == [False, True, False, True]


def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path):
    save(tmp_path, *range(1, 8), keep=2, keep_every=3)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (3, 6, 7)]
    assert not list(tmp_path.glob("*.partial"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["tensors/shard-*", "rank-0.json", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    ("damage", "expected"), [(truncate, "bytes"), (flip, "changed"), (Path.unlink, "missing")]
)
def test_damage_is_named_and_the_previous_checkpoint_used(tmp_path, file, damage, expected):
    save(tmp_path, 1, 2, 3)
    (path,) = (tmp_path / "step-00000003").glob(file)
    damage(path)
    taken, damaged = newest_intact(tmp_path, WORLD)
    assert taken is not None and taken.name == "step-00000002"
    ((broken, message),) = damaged.items()
    assert broken == tmp_path / "step-00000003"
    assert "step-00000003" in message and path.name in message
    # A damaged manifest has no further message.
    assert expected in message or path.name == "manifest.json"


def test_a_run_does_not_restart_if_all_checkpoints_are_damaged(tmp_path):
    assert newest_intact(tmp_path, WORLD) == (None, {})
    save(tmp_path, 1, 2)
    for path in checkpoints_in(tmp_path):
        flip(path / "state.json")
    with pytest.raises(UserError, match=r"is damaged: .*00002.*state.*00001.*state"):
        newest_intact(tmp_path, WORLD)


def test_a_step_may_be_damaged_several_times(tmp_path):
    for time in range(3):
        save(tmp_path, 4)
        set_aside(tmp_path / "step-00000004")
        assert names(tmp_path) == []
        assert len(list(tmp_path.glob("*.damaged*"))) == time + 1


def test_latest_names_the_newest_remaining_checkpoint(tmp_path):
    save(tmp_path, 1, 2, 3, keep=3)
    for left in (2, 1):
        set_aside(tmp_path / f"step-{left + 1:08d}")
        assert (tmp_path / "latest").read_text() == f"step-{left:08d}\n"
    set_aside(tmp_path / "step-00000001")
    assert not (tmp_path / "latest").exists()


def save_with_late_file(folder: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Save on a disk that shows a rank's file only after some pauses; returns the pauses."""
    pauses: list[float] = []
    hidden, write = folder / "hidden", writing.atomic_write

    def write_and_hide(path: Path, text: str) -> None:
        write(path, text)
        if path.name == "state.json" and after:
            path.with_name("rank-0.json").rename(hidden)

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == after:
            (partial,) = folder.glob("*.partial")
            hidden.rename(partial / "rank-0.json")

    monkeypatch.setattr(writing, "atomic_write", write_and_hide)
    with closing(CheckpointWriter(folder, WORLD, sleep=sleep)) as writer:
        writer.save(1, training_tensors(*make(1)), {"step": 1}, {"data": []})
        try:
            writer.wait()
        finally:
            assert sum(pauses) == min(after, 60)
    return pauses


@pytest.mark.parametrize("after", [0, 1, 60])
def test_the_writer_waits_for_files_that_appear_late(tmp_path, monkeypatch, after):
    assert save_with_late_file(tmp_path, after, monkeypatch) == [1] * after
    assert newest_intact(tmp_path, WORLD) == (tmp_path / "step-00000001", {})


def test_files_that_do_not_appear_within_a_minute_are_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"rank-0\.json is missing, or of no rank of this job"):
        save_with_late_file(tmp_path, 61, monkeypatch)
    assert names(tmp_path) == []


def test_unfinished_checkpoints_are_removed(tmp_path):
    save(tmp_path, 4)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000003.partial")
    with closing(CheckpointWriter(tmp_path, WORLD)) as writer:
        writer.remove_partial()
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000004", "latest"}


def test_an_old_checkpoint_that_cannot_be_removed_is_ignored(tmp_path, monkeypatch):
    """As on a network disk, where a file that is being read is renamed instead of removed."""
    real = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.name == "step-00000001.partial" and path.is_dir():
            if ignore_errors:
                return
            raise OSError("Directory not empty")
        real(path, ignore_errors=ignore_errors)

    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(writing.shutil, "rmtree", rmtree)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002"]


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    (shard,) = (path / "tensors").iterdir()
    zeros = {name: torch.zeros_like(value) for name, value in load_file(shard).items()}
    save_file(zeros, path / "tensors" / "a_stray.safetensors")
    (path / "tensors" / "z_stray.safetensors").write_bytes(b"not a tensor file")
    expected, _ = make(1)
    assert newest_intact(tmp_path, WORLD) == (path, {})
    model, optimizer = make(2)
    load_checkpoint(path, model, optimizer, WORLD)
    stored = stored_weights(path)
    assert stored.meta_tensors.keys() == expected.state_dict().keys()
    for name, value in stored.read(stored.meta_tensors).items():
        assert torch.equal(value, expected.state_dict()[name])
        assert torch.equal(value, model.state_dict()[name])


def test_a_stray_rank_file_does_not_make_weights_resumable(tmp_path):
    model, optimizer = make()
    save_weights(tmp_path, 1, Weights.from_tensors(model.state_dict()), {"step": 1})
    path = tmp_path / "step-00000001"
    (path / "rank-0.json").write_text("{}")
    with pytest.raises(UserError, match="has only weights"):
        load_checkpoint(path, model, optimizer, WORLD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("bias"), "1 missing: bias; 0 unknown: none"),
        (lambda weights: weights.update(gate=torch.ones(2)), "0 missing: none; 1 unknown: gate"),
        (
            lambda weights: weights.update(bias=torch.ones(4)),
            r"bias has shape \(4,\) instead of \(5,\)",
        ),
    ],
)
def test_the_weights_of_another_model_are_refused(tmp_path, change, message):
    model, _ = make()
    weights = dict(model.state_dict())
    change(weights)
    save_weights(tmp_path, 1, Weights.from_tensors(weights), {"step": 1})
    message = rf"step-00000001: its weights are not those of .*\({message}\); .* version of moma"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "step-00000001", model, WORLD)


def test_a_buffer_that_a_checkpoint_lacks_keeps_its_value(tmp_path):
    model, _ = make()
    model.register_buffer("cutoff_means_3E", torch.full((3, 2), 7.0))
    weights = {
        "weight": torch.ones(5, 6),
        "bias": torch.ones(5),
        "former.cutoffs_3E": torch.ones(3, 2),
    }
    save_weights(tmp_path, 1, Weights.from_tensors(weights), {"step": 1})
    load_model(tmp_path / "step-00000001", model, WORLD)
    assert torch.equal(model.state_dict()["weight"], torch.ones(5, 6))
    assert torch.equal(model.state_dict()["cutoff_means_3E"], torch.full((3, 2), 7.0))


def test_a_checkpoint_without_manifest_is_not_loaded(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"step-00000001/manifest\.json: is missing"):
        load_checkpoint(tmp_path / "step-00000001", *make(2), WORLD)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        StorageError, match=r"needs [\d,]+ bytes, but the disk has 1,000.*00001 is kept"
    ):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"] and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_failed_write_keeps_the_previous_checkpoint(tmp_path, size):
    save(tmp_path, 1)
    with (
        closing(CheckpointWriter(tmp_path, WORLD)) as writer,
        largest_file(size),
    ):
        writer.save(2, training_tensors(*make(2)), {"step": 2}, {"data": []})
        with pytest.raises(StorageError, match=r"00002: cannot write .*00001 is kept"):
            writer.wait()
    path, damaged = newest_intact(tmp_path, WORLD)
    assert path is not None and path.name == "step-00000001" and not damaged
    assert not list(tmp_path.glob("*.partial"))
    save(tmp_path, 2)  # works once there is room again
    assert names(tmp_path)[-1] == "step-00000002"
