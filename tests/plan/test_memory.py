"""Planned memory against that of real ranks, and of 256 ranks of a fake process group."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.model.depth import DepthConfig
from moma.plan.memory import gathered_bytes, held_bytes, meta_model, unit_elements
from moma.recipe import read_recipe
from moma.runtime.sharding import EngineConfig, shard
from moma.runtime.world import World
from moma.train.monitor import LossMonitor
from moma.train.recipe import Recipe
from moma.train.stages import fsdp_units, make_step, prepare_model
from tests.model.three_modalities import group

PAPER = Path(__file__).parents[2] / "configs" / "paper"
CPU = torch.device("cpu")
# Dense, single-expert and routed groups, with mixture-of-depths and without. Two ranks divide
# neither 3 experts, nor 1 depth router, nor the 321 ids.
EVERY_KIND = {
    "groups": (group("text", 3), group("image", 1), group("text image", 1)),
    "depth": DepthConfig(layers=(1,)),
}


def recipe_of(tiny: Recipe, **model: Any) -> Recipe:
    text = tiny.text_tokenizer.model_copy(update={"vocabulary_size": 321})
    model_config = tiny.model.model_copy(update=model)
    return tiny.model_copy(update={"model": model_config, "text_tokenizer": text})


def storages(tensors) -> int:
    """Return the bytes of the storages of a rank's tensors, each counted once."""
    own = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    return sum(memory.values())


def held_in(recipe: Recipe, world: World) -> dict[str, int]:
    """Return what a rank holds after a step, its gradients before they are freed."""
    vocabulary = synthetic_vocabulary(recipe)
    model = prepare_model(recipe, vocabulary, world)
    step = make_step(recipe, model, world, LossMonitor(recipe.pretrain, world.device))
    found: dict[str, int] = {}

    def measure_gradients(*_: Any) -> None:
        found["gradients"] = storages(p.grad for p in model.parameters() if p.grad is not None)

    step.optimizers[0].register_step_pre_hook(measure_gradients)
    step([synthetic_batches(recipe, vocabulary, world.rank).pack()], 1e-3)
    found["parameters"] = storages(model.parameters())
    states = [state for each in step.optimizers for state in each.state.values()]
    found["optimizer"] = storages(t for state in states for t in state.values())
    return found


@pytest.fixture
def fake_world():
    """Join a process group of which only this rank exists."""

    def join(size: int, rank: int) -> World:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return World(CPU, rank, size, init_device_mesh("cpu", (size,)))

    yield join
    distributed.destroy_process_group()


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_ranks_holds_what_is_planned(tiny, fake_world, rank, algorithm):
    recipe = recipe_of(tiny, **EVERY_KIND)
    optimizer = recipe.pretrain.optimizer.model_copy(update={"algorithm": algorithm})
    pretrain = recipe.pretrain.model_copy(update={"optimizer": optimizer})
    recipe = recipe.model_copy(update={"pretrain": pretrain})
    planned = held_bytes(meta_model(recipe), 2, recipe.pretrain.optimizer)
    assert held_in(recipe, fake_world(2, rank)) == planned[rank]
    # The last entry of an odd dimension is on the first rank.
    assert planned[0]["optimizer"] > planned[1]["optimizer"]


def step_on_rank(rank: int, port: int, recipe: Recipe, out: Path) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    world = World(CPU, rank, 2, init_device_mesh("cpu", (2,)))
    torch.save(held_in(recipe, world), out / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_hold_what_is_planned(tiny, tmp_path):
    recipe = recipe_of(tiny, **EVERY_KIND)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(step_on_rank, (port, recipe, tmp_path), nprocs=2)
    held = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert held_bytes(meta_model(recipe), 2, recipe.pretrain.optimizer) == held


def test_one_rank_holds_what_is_planned(tiny):
    recipe = recipe_of(tiny, **EVERY_KIND)
    assert held_bytes(meta_model(recipe), 1, recipe.pretrain.optimizer) == [
        held_in(recipe, World(CPU))
    ]


@pytest.mark.parametrize("rank", [0, 255])
def test_256_ranks_hold_the_planned_shards_of_the_largest_sparse_layers(fake_world, rank):
    """1.4B moe_4t4i; the hidden width 5472 is not a multiple of 256."""
    recipe = read_recipe(Recipe, PAPER / "1b4_moe_4t4i.toml", ["model.layers=2"])
    model = meta_model(recipe)
    planned = held_bytes(model, 256, recipe.pretrain.optimizer)[rank]
    whole = sum(p.numel() for p in model.parameters())
    shard(model, fsdp_units(model), fake_world(256, rank), EngineConfig(compute="bf16"))
    parameters: list[Any] = list(model.parameters())
    local = [p.to_local() for p in parameters]
    assert all(part.is_meta for part in local)
    assert sum(part.untyped_storage().nbytes() for part in local) == planned["parameters"]
    trained = [p.to_local().numel() for p in parameters if p.requires_grad]
    assert sum(8 * numel + 4 for numel in trained) == planned["optimizer"]
    # No rank holds more than 1% above an equal part.
    assert planned["parameters"] < 1.01 * 4 * whole / 256


@pytest.mark.parametrize(
    ("name", "ranks", "gigabytes"), [("435m_moe_4t4i", 24, 1.24), ("1b4_moe_4t4i", 384, 0.31)]
)
def test_ranks_hold_equal_parts_of_any_experts(name, ranks, gigabytes):
    """Of weights, gradients and optimizer state; 24 and 384 divide neither width of the experts."""
    recipe = read_recipe(Recipe, PAPER / f"{name}.toml")
    model, optimizer = meta_model(recipe), recipe.pretrain.optimizer
    (whole,) = (sum(each.values()) for each in held_bytes(model, 1, optimizer))
    largest = max(sum(each.values()) for each in held_bytes(model, ranks, optimizer))
    assert largest == pytest.approx(gigabytes * 1e9, rel=0.01)
    assert largest < 1.05 * whole / ranks


def test_every_parameter_is_in_one_unit(tiny):
    model = meta_model(recipe_of(tiny, groups="mod_moe_3t2i"))
    root, units = unit_elements(model)
    assert root + sum(units) == sum(p.numel() for p in model.parameters())
    assert root == 2 * 321 * 16 + 16 and len(units) == 2 * 3


def test_gathered_bytes(tiny):
    """One rank gathers nothing; a GPU that computes in bf16 has a second copy of its weights."""
    recipe = recipe_of(tiny, groups="moe_2t2i")
    model, gpu = meta_model(recipe), torch.device("cuda")
    whole = sum(p.numel() for p in model.parameters())
    assert gathered_bytes(model, recipe, 1, CPU) == 0
    assert gathered_bytes(model, recipe, 1, gpu) == 2 * whole
    root, units = unit_elements(model)
    text, image, rest = units[:3]
    assert units == 2 * [text, image, rest] and text == image > rest
    expected = 4 * (2 * root + text + image + 2 * text)
    assert gathered_bytes(model, recipe, 2, CPU) == expected
