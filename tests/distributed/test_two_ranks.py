"""Two gloo processes: sharded training equals one process on the same groups of tokens."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from moma.data.batches import Batches
from moma.runs import Run
from moma.runtime.checkpoint import (
    load_checkpoint,
    load_model,
    save_checkpoint,
    stored_weights,
)
from moma.runtime.optimizer import make_optimizer
from moma.runtime.sharding import shard
from moma.runtime.world import World, join_world
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.step import Step, next_token_objective
from moma.vocabulary import Vocabulary

RANKS, STEPS = 2, 3


def build(recipe: Recipe, world: World):
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = recipe.build_model(vocabulary)
    for router in model.auxiliary_routers():
        router.requires_grad_(False)
    shard(model, model.units(), world)
    optimizer = make_optimizer(model, recipe.pretrain.optimizer)
    step = Step(model, optimizer, next_token_objective(1e-5, compiled=False), 1.0, world)
    return vocabulary, model, optimizer, step


def batches_of(recipe: Recipe, vocabulary: Vocabulary, rank: int) -> Batches:
    return Batches(recipe.data, vocabulary, seed=0, rank=rank, world_size=RANKS)


def in_process(rank: int, port: int, job, *arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with join_world() as world:
        job(world, *arguments)


def on_two_ranks(job, *arguments) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(in_process, (port, job, *arguments), nprocs=RANKS)


def sharded_steps(world: World, recipe: Recipe, out: Path) -> None:
    vocabulary, model, optimizer, step = build(recipe, world)
    data = batches_of(recipe, vocabulary, world.rank)
    taken = [step([next(data)], 1e-2) for _ in range(STEPS)]
    sums, norms = [s for s, _ in taken], [norm.full_tensor() for _, norm in taken]
    state = {"data": data.get_state()}
    save_checkpoint(out, STEPS, model, optimizer, {"step": STEPS}, state, world, keep=1)
    # What was saved comes back, on the same ranks.
    _, again, optimizer, step = build(recipe, world)
    _, rank_state = load_checkpoint(out / f"step-{STEPS:08d}", again, optimizer, world)
    assert rank_state is not None and rank_state["data"] == data.get_state()
    batch = next(data)
    for other, fresh in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(other.full_tensor(), fresh.full_tensor())
    sums.append(step([batch], 1e-2)[0])
    if world.rank == 0:
        torch.save((torch.stack(sums), torch.stack(norms)), out / "sums.pt")


@pytest.mark.parametrize("groups", ["dense", "moe_2t2i", "moe_3t1i", "mod_moe_2t2i"])
def test_two_ranks_equal_one_on_the_same_token_groups(tiny, tmp_path, groups):
    recipe = tiny.model_copy(update={"model": tiny.model.model_copy(update={"groups": groups})})
    on_two_ranks(sharded_steps, recipe, tmp_path)
    vocabulary, model, _, step = build(recipe, World(torch.device("cpu")))
    data = [batches_of(recipe, vocabulary, rank) for rank in range(RANKS)]
    taken = [step([next(part) for part in data], 1e-2) for _ in range(STEPS)]
    sums, norms = [s for s, _ in taken], [norm for _, norm in taken]
    sharded = recipe.build_model(vocabulary)
    load_model(tmp_path / f"step-{STEPS:08d}", sharded, World(torch.device("cpu")))
    for name, parameter in model.named_parameters():
        other = sharded.get_parameter(name)
        torch.testing.assert_close(parameter, other, atol=1e-5, rtol=1e-4, msg=name)
    # The parts of both ranks can be read without a model, too.
    stored = stored_weights(tmp_path / f"step-{STEPS:08d}")
    assert stored.outlines.keys() == sharded.state_dict().keys()
    for name, value in stored.read(stored.outlines).items():
        assert torch.equal(value, sharded.state_dict()[name])
    # One more step tells the optimizer's state.
    sums.append(step([next(part) for part in data], 1e-2)[0])
    found, found_norms = torch.load(tmp_path / "sums.pt", weights_only=True)
    # Before clipping and Adam, which hide a wrong scale of the gradient.
    torch.testing.assert_close(found_norms, torch.stack(norms), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found, torch.stack(sums), atol=1e-2, rtol=1e-4)


def train_job(world: World, recipe: Recipe) -> None:
    train(recipe, world, quiet=True)


def test_whole_run_on_two_ranks(tiny, tmp_path):
    recipe = tiny.model_copy(update={"run": tmp_path / "run"})
    on_two_ranks(train_job, recipe)
    on_two_ranks(train_job, recipe)  # finds itself finished
    rows = [row["step"] for row in Run(recipe.run).read_metrics()]
    assert rows == [2, 4, 6, 8]
