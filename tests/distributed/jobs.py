"""What two and four ranks compute for `test_two_ranks.py`, and one process for comparison."""

import json
import operator
import shutil
from contextlib import closing
from dataclasses import replace
from functools import reduce
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import Batch
from moma.errors import UserError
from moma.model.depth import DepthConfig
from moma.runs import Run
from moma.runtime.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    read_rank_states,
    training_tensors,
)
from moma.runtime.sharding import EngineConfig, shard
from moma.runtime.world import World
from moma.runtime.writer import CheckpointWriter
from moma.train import loop, stages
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.stages import make_step, prepare_model
from moma.train.statistics import Statistics
from moma.vocabulary import Vocabulary
from tests.factories import OperationCounter

GROUPS, STEPS = 4, 3
# Small: AdamW enlarges differences of rounding, which decide close calls of routers.
RATE = 1e-3
ONE_PROCESS = World(torch.device("cpu"))
# Architecture, engine, and tolerance compared with one fp32 process.
CASES = {
    "dense": ("dense", EngineConfig(), 1e-5),
    "moe_2t2i": ("moe_2t2i", EngineConfig(), 1e-5),
    "mod_moe_3t1i": ("mod_moe_3t1i", EngineConfig(), 1e-5),
    "token_2t2i": ("token_2t2i", EngineConfig(), 1e-5),
    "null_3t1i": ("null_3t1i", EngineConfig(), 1e-5),
    "layer": ("moe_2t2i", EngineConfig(recompute="layer"), 1e-5),
    "selective": ("mod_moe_3t1i", EngineConfig(recompute="selective"), 1e-5),
    "reduce": ("moe_2t2i", EngineConfig(reduce="bf16"), 2e-2),
    "compute": ("moe_2t2i", EngineConfig(compute="bf16"), 5e-2),
    "aux_router": ("mod_moe_3t1i", EngineConfig(), 1e-5),
}
STAGES = {"aux_router": "aux_router"}  # the others pre-train
HYBRID = EngineConfig(replicate=2)


def recipe_of(tiny: Recipe, groups: str, engine: EngineConfig, stage: str = "pretrain") -> Recipe:
    # Neither two nor four ranks divide the rows of `down`, E · 43.
    model = tiny.model.model_copy(update={"groups": groups, "hidden": 43})
    # Equal tokens must not have equal scores, between which rounding would decide: a router sees
    # them only after they attended to all that precedes them. With this seed, the scores of the
    # last token that is selected and of the first one that is not differ by 8e-4 or more.
    changes: dict[str, Any] = {"attention_mask": "causal"}
    if groups.startswith("mod"):
        changes["depth"] = DepthConfig(layers=(1,))
    model = model.model_copy(update=changes)
    return tiny.model_copy(update={"model": model, "engine": engine, "stage": stage, "seed": 6})


def stage_of(case: str) -> str:
    return STAGES.get(case, "pretrain")


def build(recipe: Recipe, world: World):
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, world)
    step = make_step(recipe, model, world)
    groups = [
        Batches(recipe.data, vocabulary, seed=0, rank=number, world_size=GROUPS)
        for number in range(GROUPS)[world.rank :: world.size]
    ]
    return model, step.optimizers, step, groups


def statistics_of(recipe: Recipe, model, world: World, step, groups) -> dict[str, Tensor]:
    """Take a step; returns its sums and norms over all ranks."""
    statistics = Statistics(model, recipe.engine.replicate)
    sums, norm = step([next(group) for group in groups], RATE, statistics)
    found = {"sums": sums, "norm": norm}
    for name, value in statistics.sums.items():
        if name.startswith("gradient"):
            found[name] = world.sum(value).sqrt()
    return found


def take_steps(world: World, recipe: Recipe, out: Path) -> None:
    """Train, save, and take one more step, whose norms depend on the optimizer's state."""
    model, optimizers, step, groups = build(recipe, world)
    found = {}
    for number in range(STEPS):
        sums, norm = step([next(group) for group in groups], RATE)
        found[f"{number} sums"], found[f"{number} norm"] = sums, norm
    for router in model.token_routers():  # biases are the same on all ranks
        assert torch.equal(world.sum(router.bias_O.clone()), world.size * router.bias_O)
    state = {"data": [group.get_state() for group in groups]}
    with closing(CheckpointWriter(out, world)) as writer:
        writer.save(STEPS, training_tensors(model, optimizers), {"step": STEPS}, state)
        writer.wait()
    found |= statistics_of(recipe, model, world, step, groups)
    if world.rank == 0:
        torch.save(found, out / f"found-{world.size}.pt")


def resume_step(world: World, recipe: Recipe, out: Path) -> dict[str, Tensor]:
    """Load the checkpoint of another number of ranks, and take the next step."""
    model, optimizers, step, groups = build(recipe, world)
    path = out / f"step-{STEPS:08d}"
    load_checkpoint(path, model, optimizers, world)
    states = [state["data"] for state in read_rank_states(path)]
    for number, group in zip(range(GROUPS)[world.rank :: world.size], groups, strict=True):
        group.set_state(states[number % len(states)][number // len(states)])
    return statistics_of(recipe, model, world, step, groups)


class FixedBatches:
    """A rank's part of four streams of micro-batches, independent of the number of ranks.

    So a step has the same token groups on any number of ranks, unlike resharded batches.
    """

    def __init__(self, recipe: Recipe, world: World):
        vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
        self._lanes = {
            lane: Batches(recipe.data, vocabulary, 0, lane, GROUPS)
            for lane in range(GROUPS)[world.rank :: world.size]
        }
        self._turn = cycle(self._lanes.values())

    def __next__(self) -> Batch:
        return next(next(self._turn))

    def get_state(self) -> dict[str, Any]:
        return {str(lane): batches.get_state() for lane, batches in self._lanes.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for lane, batches in self._lanes.items():
            batches.set_state(state[str(lane)])

    def close(self) -> None:
        pass


def train_fixed(world: World, tiny: Recipe, run: Path) -> Run:
    """`train` with `FixedBatches`; two micro-batches per step on each of two ranks."""
    stage = tiny.pretrain.model_copy(update={"gradient_accumulation_steps": GROUPS // 2})
    recipe = tiny.model_copy(update={"run": run, "pretrain": stage})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prefetch", lambda batches, config: FixedBatches(recipe, world))
        together = lambda states, size: [reduce(operator.or_, states)] * size  # noqa: E731
        patch.setattr(loop, "reshard", together)
        return loop.train(recipe, world, quiet=True)


def recipe_with(tiny: Recipe, run: str) -> Recipe:
    recipe = recipe_of(tiny, "moe_2t2i", EngineConfig())
    return recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"experts_implementation": run})}
    )


def fsdp_units(recipe: Recipe, world: World) -> list[str]:
    """Modules of which FSDP gathers the weights separately, except for the routers."""
    model, *_ = build(recipe, world)
    found = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return [name for name in found if not name.endswith(".router")]


def reductions(tiny: Recipe, engine: EngineConfig, world: World) -> tuple[int, float]:
    """Number of reductions of gradients in a step of two micro-batches per rank, and its norm."""
    recipe = recipe_of(tiny, "moe_2t2i", engine)
    _, _, step, groups = build(recipe, world)
    with OperationCounter() as counting:
        _, norm = step([next(group) for group in groups], RATE)
    found = [count for name, count in counting.counts.items() if "reduce_scatter" in name]
    return sum(found), float(norm)


def accumulated_gradient(world: World) -> list[float]:
    """The gradient of 1 and of eight times 2⁻⁹, computed and summed over ranks in bf16."""
    model = torch.nn.Linear(2, 1, bias=False)
    shard(model, [], world, EngineConfig(compute="bf16", reduce="bf16"))
    assert isinstance(model, FSDPModule)
    for number, value in enumerate([1.0] + [2**-9] * 8, 1):
        model.set_requires_gradient_sync(number == 9)
        model(torch.full((1, 2), value, dtype=torch.bfloat16)).sum().backward()
    gradient = model.weight.grad
    assert isinstance(gradient, DTensor)
    return gradient.full_tensor().flatten().tolist()


def float8_step(tiny: Recipe, how: Any, world: World) -> dict[str, Tensor]:
    """The first step's sums and norms, with the products of experts rounded to float8 or not."""
    engine = EngineConfig(float8=how, recompute="selective")
    recipe = recipe_of(tiny, "moe_2t2i", engine)
    config = recipe.model.model_copy(update={"hidden": 48})  # a multiple of 16
    recipe = recipe.model_copy(update={"model": config})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "use_float8", lambda *_: None)  # linear layers, by torchao
        model, _, step, groups = build(recipe, world)
    return statistics_of(recipe, model, world, step, groups)


def gathered_dtypes(tiny: Recipe, world: World) -> dict[str, str]:
    """The dtype of the second layer's weights in a forward pass that computes in bf16."""
    model, _, step, groups = build(
        recipe_of(tiny, "mod_moe_3t1i", EngineConfig(compute="bf16")), world
    )
    found: dict[str, str] = {}

    def read(*_: Any) -> None:
        layer = model.layers[1]
        weights = {
            "router": layer.experts.groups[0].router.weight,
            "depth": layer.depth.router.weight,
            "query": layer.attention.query.weight,
        }
        found.update({name: str(weight.dtype) for name, weight in weights.items()})

    model.layers[1].attention.register_forward_pre_hook(read)
    step([next(group) for group in groups], RATE)
    return found


@torch.no_grad()
def select_on_one_rank(tiny: Recipe, world: World) -> None:
    """A forward pass in which depth routers select no token on rank 0, and all on rank 1."""
    model, *_, groups = build(recipe_of(tiny, "mod_moe_3t1i", EngineConfig()), world)
    for router in model.routers():
        threshold = 1e9 if world.rank == 0 and router.out_features == 1 else -1e9
        router.cutoff_means_3E.copy_(torch.tensor([[threshold], [1.0], [1.0]]))
    tokens_BS = torch.from_numpy(next(groups[0]).tokens_BS)
    model.eval()(tokens_BS, routing=model.named_routing("threshold"))


def copy_half(out: Path, run: Path) -> Path:
    """A copy of the two ranks' run without its last checkpoint."""
    shutil.copytree(out / "fixed", run)
    shutil.rmtree(checkpoints_in(Run(run).checkpoints)[-1])
    return run


def job_of_two(world: World, tiny: Recipe, out: Path) -> None:
    select_on_one_rank(tiny, world)
    for name, (groups, engine, _) in CASES.items():
        take_steps(world, recipe_of(tiny, groups, engine, stage_of(name)), out / name)
    several = replace(world, nodes=2)
    take_steps(several, recipe_of(tiny, "moe_2t2i", EngineConfig()), out / "several")
    run = tiny.model_copy(update={"run": out / "run"})
    train(run, world, quiet=True)
    train(run, world, quiet=True)  # is finished already
    train_fixed(world, tiny, out / "fixed")
    dtypes = gathered_dtypes(tiny, world)
    if world.rank == 0:
        (out / "dtypes.json").write_text(json.dumps(dtypes))
    counts = [
        reductions(tiny, EngineConfig(reduce=dtype, reduce_once=once), world)
        for dtype in ("fp32", "bf16")
        for once in (True, False)
    ]
    found = [*counts, accumulated_gradient(world)]
    rounded = float8_step(tiny, "emulate", world)
    if world.rank == 0:
        torch.save(rounded, out / "float8.pt")
    if world.rank == 0:
        (out / "reductions.json").write_text(json.dumps(found))
    units = {run: fsdp_units(recipe_with(tiny, run), world) for run in ("sequential", "batched")}
    if world.rank == 0:
        (out / "units.json").write_text(json.dumps(units))
    seed = recipe_of(tiny, "moe_1t1i", EngineConfig())
    stage = seed.pretrain.model_copy(update={"steps": 4})
    train(seed.model_copy(update={"run": out / "seed", "pretrain": stage}), world, quiet=True)


def job_of_four(world: World, tiny: Recipe, two: Path, out: Path) -> None:
    take_steps(world, recipe_of(tiny, "moe_2t2i", HYBRID), out)
    for name, engine in (("sharded", EngineConfig()), ("hybrid", HYBRID)):
        found = resume_step(world, recipe_of(tiny, "moe_2t2i", engine), two / "moe_2t2i")
        if world.rank == 0:
            torch.save(found, out / f"{name}.pt")
    if world.rank == 0:
        copy_half(two, out / "fixed")
    world.barrier()
    train_fixed(world, tiny, out / "fixed")
    grow_step(world, tiny.model_copy(update={"run": two / "larger"}), out)


def grow_step(world: World, recipe: Recipe, out: Path) -> None:
    """Two micro-batches cannot be divided among four ranks, unless steps may grow."""
    with pytest.raises(UserError) as refused:
        train(recipe, world, quiet=True)
    if world.rank == 0:
        (out / "refused").write_text(str(refused.value))
    engine = recipe.engine.model_copy(update={"global_batch_size": "grows"})
    train(recipe.model_copy(update={"engine": engine}), world, quiet=True)
