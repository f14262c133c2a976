"""Muon: equal to PyTorch's on matrices, to itself on stacks, and to one process when sharded."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moma.runtime.checkpoint import load_checkpoint, training_tensors
from moma.runtime.muon import Muon, orthogonalize, plan_exchange
from moma.runtime.sharding import shard
from moma.runtime.world import World
from moma.runtime.writer import CheckpointWriter
from tests.processes import on_ranks

WORLD = World(torch.device("cpu"))
LR, MOMENTUM, DECAY, STEPS = 0.1, 0.9, 0.5, 3


SHAPES = ((6, 4), (6, 4), (5, 7), (1, 8), (12, 6), (12, 6), (10, 4), (15, 7), (3, 5))
MATRICES = (1, 1, 1, 1, 3, 3, 2, 3, 3)  # stacked in each


class Stacks(nn.Module):
    """Matrices and stacks of sizes that the ranks do and do not divide."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(*s, generator=generator) for s in SHAPES)


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(p.shape, generator=generator) for p in Stacks().weights]


def muon(model: Stacks) -> Muon:
    groups: dict[int, list[nn.Parameter]] = {}
    for parameter, matrices in zip(model.weights, MATRICES, strict=True):
        groups.setdefault(matrices, []).append(parameter)
    return Muon(
        [{"params": parameters, "matrices": count} for count, parameters in groups.items()],
        LR,
        MOMENTUM,
        DECAY,
    )


def take_step(model: Stacks, optimizer: Muon, step: int) -> None:
    for parameter, gradient in zip(model.weights, gradients(step), strict=True):
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()


def trained(steps: int = STEPS) -> list[Tensor]:
    model = Stacks()
    optimizer = muon(model)
    for step in range(steps):
        take_step(model, optimizer, step)
    return [parameter.detach() for parameter in model.weights]


def test_matrices_of_a_stack_are_updated_like_pytorchs():
    expected = []
    for number, parameter in enumerate(Stacks().weights):
        parts = parameter.detach().chunk(MATRICES[number])
        matrices = [nn.Parameter(matrix.clone()) for matrix in parts]
        reference = torch.optim.Muon(matrices, LR, DECAY, MOMENTUM, adjust_lr_fn="match_rms_adamw")
        for step in range(STEPS):
            for matrix, gradient in zip(
                matrices, gradients(step)[number].chunk(len(matrices)), strict=True
            ):
                matrix.grad = gradient
            reference.step()
        expected.append(torch.cat([matrix.detach() for matrix in matrices]))
    # Products of bf16 matrices may round differently in a batch.
    torch.testing.assert_close(trained(), expected, rtol=2e-2, atol=2e-2)


def test_singular_values_become_one():
    for update in orthogonalize([torch.randn(18, 20).bfloat16()], matrices=3):
        values = torch.linalg.svdvals(update.float().view(3, 6, 20))
        assert values.min() > 0.5 and values.max() < 1.5


def job(world: World, out: Path) -> None:
    model = Stacks()
    shard(model, [], world)
    optimizer = muon(model)
    for step in range(STEPS):
        take_step(model, optimizer, step)
        if step == 0:
            with closing(CheckpointWriter(out, world)) as writer:
                tensors = training_tensors(model, (optimizer,))
                writer.save(1, tensors, {"step": 1}, {})
                writer.wait()
            planned = plan_exchange.cache_info().misses
    # No step copies a plan to the device again.
    assert plan_exchange.cache_info().misses == planned > 0
    for parameter in model.weights:
        assert optimizer.state[parameter]["momentum_buffer"].placements == parameter.placements
    full = [parameter.full_tensor() for parameter in model.weights]
    if world.rank == 0:
        torch.save(full, out / "weights.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    on_ranks(2, job, out)
    return out


def test_two_ranks_equal_one(two):
    found = torch.load(two / "weights.pt", weights_only=True)
    torch.testing.assert_close(found, trained(), rtol=2e-2, atol=2e-2)


def test_a_checkpoint_of_two_ranks_is_resumed_on_one(two):
    model = Stacks()
    optimizer = muon(model)
    load_checkpoint(two / "step-00000001", model, (optimizer,), WORLD)
    for step in range(1, STEPS):
        take_step(model, optimizer, step)
    torch.testing.assert_close([*model.weights], trained(), rtol=2e-2, atol=2e-2)
    # The momentum matters.
    fresh = Stacks()
    other = muon(fresh)
    for step in range(1, STEPS):
        take_step(fresh, other, step)
    assert not torch.allclose(fresh.weights[0], model.weights[0], atol=5e-2)
