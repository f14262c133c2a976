"""Checkpoints: whole or not taken, written beside the training, kept as asked for."""

import resource
import shutil
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from moma.errors import UserError
from moma.runtime import writer as writing
from moma.runtime.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    newest_whole,
    read_rank_states,
    read_state,
    restore_random_state,
)
from moma.runtime.world import World
from moma.runtime.writer import CheckpointWriter

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
            writer.save(step, *make(step), {"step": step}, {"data": [step]})
        writer.wait()


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder)]


def test_everything_comes_back(tmp_path):
    model, optimizer = make()
    with closing(CheckpointWriter(tmp_path, WORLD)) as writer:
        writer.save(7, model, optimizer, {"step": 7}, {"data": [1, 2]})
        drawn = torch.rand(3)
        expected = [p.detach().clone() for p in model.parameters()]
        moments = [optimizer.state[p]["exp_avg"].clone() for p in model.parameters()]
        with torch.no_grad():  # what happens after the call must not be in it
            for parameter in model.parameters():
                parameter.add_(1)
                optimizer.state[parameter]["exp_avg"].add_(1)
        writer.wait()
    path, damaged = newest_whole(tmp_path, WORLD)
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


def test_the_newest_stay_and_every_nth(tmp_path):
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
    ("damage", "told"), [(truncate, "bytes"), (flip, "changed"), (Path.unlink, "missing")]
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, file, damage, told):
    save(tmp_path, 1, 2, 3)
    (path,) = (tmp_path / "step-00000003").glob(file)
    damage(path)
    taken, (message,) = newest_whole(tmp_path, WORLD)
    assert taken is not None and taken.name == "step-00000002"
    assert "step-00000003" in message and path.name in message
    # A damaged manifest can tell no more of itself.
    assert told in message or path.name == "manifest.json"


def test_without_a_whole_checkpoint_nothing_begins_anew(tmp_path):
    assert newest_whole(tmp_path, WORLD) == (None, [])
    save(tmp_path, 1, 2)
    for path in checkpoints_in(tmp_path):
        flip(path / "state.json")
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*00002.*state.*00001.*state"):
        newest_whole(tmp_path, WORLD)


def test_without_room_the_old_one_stays(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"needs [\d,]+ bytes, but the disk has 1,000.*00001 is kept"
    ):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"] and not list(tmp_path.glob("*.partial"))


@contextmanager
def largest_file(size: int):
    """Writes beyond it fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_write_that_fails_keeps_the_old_one(tmp_path, size):
    save(tmp_path, 1)
    with (
        closing(CheckpointWriter(tmp_path, WORLD)) as writer,
        largest_file(size),
    ):
        writer.save(2, *make(2), {"step": 2}, {"data": []})
        with pytest.raises(UserError, match=r"00002: cannot write .*00001 is kept"):
            writer.wait()
    path, damaged = newest_whole(tmp_path, WORLD)
    assert path is not None and path.name == "step-00000001" and not damaged
    assert not list(tmp_path.glob("*.partial"))
    save(tmp_path, 2)  # and goes on when there is room again
    assert names(tmp_path)[-1] == "step-00000002"
