"""Planned memory against what is really held: on two gloo ranks, and on 256 that are made up."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.plan.memory import gathered_bytes, held_bytes, meta_model, unit_elements
from moma.recipe import read_recipe
from moma.runtime.sharding import EngineConfig, shard, shard_dimension
from moma.runtime.world import World
from moma.train.monitor import LossMonitor
from moma.train.recipe import Recipe
from moma.train.stages import fsdp_units, make_step, prepare_model

PAPER = Path(__file__).parents[2] / "configs" / "paper"
CPU = torch.device("cpu")
# Two ranks divide neither 3 experts, nor 1 gate, nor the 321 ids.
GROUPS = ("dense", "moe_3t1i", "mod_moe_3t2i")


def recipe_of(tiny: Recipe, groups: str, ids: int = 321) -> Recipe:
    model = tiny.model.model_copy(update={"groups": groups})
    text = tiny.text_tokenizer.model_copy(update={"vocabulary_size": ids})
    return tiny.model_copy(update={"model": model, "text_tokenizer": text})


def storages(tensors) -> int:
    """Bytes of the memory behind this rank's tensors, each counted once."""
    own = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    return sum(memory.values())


def held_in(recipe: Recipe, world: World) -> dict[str, int]:
    """What a rank holds after a step, with its gradients measured before they are freed."""
    vocabulary = synthetic_vocabulary(recipe)
    model = prepare_model(recipe, vocabulary, world)
    step = make_step(recipe, model, world, LossMonitor(recipe.pretrain, world.device))
    found: dict[str, int] = {}

    def catch_gradients(*_: Any) -> None:
        found["gradients"] = storages(p.grad for p in model.parameters() if p.grad is not None)

    step.optimizer.register_step_pre_hook(catch_gradients)
    step([synthetic_batches(recipe, vocabulary, world.rank).pack()], 1e-3)
    found["parameters"] = storages(model.parameters())
    states = step.optimizer.state.values()
    found["optimizer"] = storages(t for state in states for t in state.values())
    return found


def in_process(rank: int, port: int, recipes: list[Recipe], out: Path) -> None:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    world = World(CPU, rank, 2, init_device_mesh("cpu", (2,)))
    torch.save([held_in(recipe, world) for recipe in recipes], out / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("held")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    recipes = [recipe_of(tiny, groups) for groups in GROUPS]
    multiprocessing.spawn(in_process, (port, recipes, out), nprocs=2)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("number", range(len(GROUPS)), ids=GROUPS)
def test_two_ranks_hold_what_is_planned(tiny, of_two, number):
    model = meta_model(recipe_of(tiny, GROUPS[number]))
    for rank in (0, 1):
        assert held_bytes(model, 2)[rank] == of_two[rank][number]
    # The last row of an odd table is on the first rank.
    assert of_two[0][number]["optimizer"] > of_two[1][number]["optimizer"]


def test_one_rank_holds_what_is_planned(tiny):
    recipe = recipe_of(tiny, "mod_moe_3t2i")
    assert held_bytes(meta_model(recipe), 1) == [held_in(recipe, World(CPU))]


@pytest.fixture
def made_up_world():
    """Ranks of which only this one exists."""

    def join(size: int, rank: int) -> World:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return World(CPU, rank, size, init_device_mesh("cpu", (size,)))

    yield join
    distributed.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 255])
def test_256_ranks_of_the_largest_sparse_model_build_their_shards(made_up_world, rank):
    """1.4B moe_4t4i; hidden width 5472 is no multiple of 256."""
    recipe = read_recipe(Recipe, PAPER / "1b4_moe_4t4i.toml")
    model = meta_model(recipe)
    planned = held_bytes(model, 256)[rank]
    whole = sum(p.numel() for p in model.parameters())
    shard(model, fsdp_units(model), made_up_world(256, rank), EngineConfig(compute="bf16"))
    parameters: list[Any] = list(model.parameters())
    local = [p.to_local() for p in parameters]
    assert all(part.is_meta for part in local)
    assert sum(part.untyped_storage().nbytes() for part in local) == planned["parameters"]
    trained = [p.to_local().numel() for p in parameters if p.requires_grad]
    assert sum(8 * numel + 4 for numel in trained) == planned["optimizer"]
    # As even as can be: no rank holds more than 1% above its part.
    assert planned["parameters"] < 1.01 * 4 * whole / 256


@pytest.mark.parametrize(
    ("shape", "ranks", "dimension"),
    [((6, 8, 24), 4, 1), ((6, 9, 8), 4, 2), ((6, 9, 9), 4, 0), ((9, 8), 4, 0), ((7,), 4, 0)],
)
def test_stacks_are_cut_where_the_ranks_divide_them(shape, ranks, dimension):
    assert shard_dimension(torch.empty(shape, device="meta"), ranks) == dimension


def test_units_hold_every_parameter_once(tiny):
    model = meta_model(recipe_of(tiny, "mod_moe_3t2i"))
    root, units = unit_elements(model)
    assert root + sum(units) == sum(p.numel() for p in model.parameters())
    assert root == 2 * 321 * 16 + 16 and len(units) == 2 * 3


def test_what_is_gathered(tiny):
    """One rank gathers nothing; in bf16 a GPU keeps its weights a second time."""
    recipe = recipe_of(tiny, "moe_2t2i")
    model, gpu = meta_model(recipe), torch.device("cuda")
    whole = sum(p.numel() for p in model.parameters())
    assert gathered_bytes(model, recipe, 1, CPU) == 0
    assert gathered_bytes(model, recipe, 1, gpu) == 2 * whole
    root, units = unit_elements(model)
    text, image, rest = units[:3]
    assert units == 2 * [text, image, rest] and text == image > rest
    expected = 4 * (2 * root + text + image + 2 * text)
    assert gathered_bytes(model, recipe, 2, CPU) == expected
