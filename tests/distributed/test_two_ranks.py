"""Gloo processes: sharded training equals one process on the same groups of tokens.

A step has four micro-batches ("token groups"), divided among one, two or four ranks.
"""

import json
import operator
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache, reduce
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moma.data.batches.iterator import Batches, reshard
from moma.data.batches.packing import Batch
from moma.errors import UserError
from moma.runs import Run
from moma.runtime.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    load_model,
    read_rank_states,
    stored_weights,
    training_tensors,
)
from moma.runtime.sharding import EngineConfig, shard
from moma.runtime.world import World
from moma.runtime.writer import CheckpointWriter
from moma.train import loop
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.stages import make_step, prepare_model
from moma.train.statistics import Statistics
from moma.vocabulary import Vocabulary
from tests.factories import OperationCounter
from tests.processes import on_ranks

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
    # Equal tokens have equal scores in the first layer: with most seeds its last slot falls among
    # them, where rounding decides.
    return tiny.model_copy(update={"model": model, "engine": engine, "stage": stage, "seed": 3})


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


def copy_half(out: Path, run: Path) -> Path:
    """A copy of the two ranks' run without its last checkpoint."""
    shutil.copytree(out / "fixed", run)
    shutil.rmtree(checkpoints_in(Run(run).checkpoints)[-1])
    return run


def assert_resumed_equals(whole: Run, run: Run) -> None:
    records, others = whole.read_metrics(), run.read_metrics()
    assert [record["step"] for record in others] == [2, 4, 6, 8] and records[:2] == others[:2]
    for record, other in zip(records[2:], others[2:], strict=True):
        for key in ("tokens", "flops", "learning_rate"):
            assert record[key] == other[key]
        for key in ("loss", "loss_text", "loss_image"):
            assert other[key] == pytest.approx(record[key], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(record["gradient_norm"], rel=1e-4)


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


def gathered_dtypes(tiny: Recipe, world: World) -> dict[str, str]:
    """The dtype of the first layer's weights in a forward pass that computes in bf16."""
    model, _, step, groups = build(
        recipe_of(tiny, "mod_moe_3t1i", EngineConfig(compute="bf16")), world
    )
    found: dict[str, str] = {}

    def read(*_: Any) -> None:
        layer = model.layers[0]
        weights = {
            "router": layer.experts.groups[0].router.weight,
            "gate": layer.depth.router.weight,
            "query": layer.attention.query.weight,
        }
        found.update({name: str(weight.dtype) for name, weight in weights.items()})

    model.layers[0].attention.register_forward_pre_hook(read)
    step([next(group) for group in groups], RATE)
    return found


@torch.no_grad()
def select_on_one_rank(tiny: Recipe, world: World) -> None:
    """A forward pass in which no gate of rank 0 selects a token, and all of rank 1 select all."""
    model, *_, groups = build(recipe_of(tiny, "mod_moe_3t1i", EngineConfig()), world)
    for router in model.routers():
        threshold = 1e9 if world.rank == 0 and router.out_features == 1 else -1e9
        router.cutoffs_3E.copy_(torch.tensor([[threshold], [1.0], [1.0]]))
    tokens_BS = torch.from_numpy(next(groups[0]).tokens_BS)
    model.eval()(tokens_BS, routing=model.named_routing("threshold"))


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
    if world.rank == 0:
        (out / "reductions.json").write_text(json.dumps(found))
    units = {run: fsdp_units(recipe_with(tiny, run), world) for run in ("sequential", "batched")}
    if world.rank == 0:
        (out / "units.json").write_text(json.dumps(units))
    seed = recipe_of(tiny, "moe_1t1i", EngineConfig())
    train(seed.model_copy(update={"run": out / "seed"}), world, quiet=True)


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
    engine = recipe.engine.model_copy(update={"step_size": "grows"})
    train(recipe.model_copy(update={"engine": engine}), world, quiet=True)


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two")
    for name in CASES:
        (out / name).mkdir()
    on_ranks(2, job_of_two, tiny, out)
    return out


@pytest.fixture(scope="module")
def four(tiny, two, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("four")
    shutil.copytree(two / "run", two / "larger")
    shutil.rmtree(checkpoints_in(two / "larger" / "checkpoints")[-1])
    on_ranks(4, job_of_four, tiny, two, out)
    return out


def test_routers_compute_in_fp32_when_all_else_is_bf16(two):
    found = json.loads((two / "dtypes.json").read_text())
    assert found == {"router": "torch.float32", "gate": "torch.float32", "query": "torch.bfloat16"}


def test_reductions_per_step(two):
    *counts, accumulated = json.loads((two / "reductions.json").read_text())
    (once, norm), (each, other), (once_bf16, norm_bf16), (each_bf16, other_bf16) = counts
    assert 0 < 2 * once == each and norm == pytest.approx(other, rel=1e-5)
    assert (once_bf16, each_bf16) == (once, each) and norm_bf16 not in (norm, other_bf16)
    assert norm_bf16 == pytest.approx(norm, rel=1e-2)
    # In bf16 the sum would stay at 1.
    assert accumulated == [1 + 2**-6] * 2


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory) -> Callable[[Recipe], Path]:
    """The folder of the steps of one process in fp32, taken once for each recipe."""

    @cache
    def folder_of(groups: str, stage: str) -> Path:
        out = tmp_path_factory.mktemp("one")
        take_steps(ONE_PROCESS, recipe_of(tiny, groups, EngineConfig(), stage), out)
        return out

    return lambda recipe: folder_of(recipe.model.groups, recipe.stage)


def assert_equals_one_process(
    recipe: Recipe, single: Path, out: Path, ranks: int, near: float
) -> None:
    """`recipe` with the default engine; the folders of one process's steps and of the ranks'."""
    expected, found = load(single / "found-1.pt"), load(out / f"found-{ranks}.pt")
    assert expected.keys() == found.keys()
    kinds = [name for name in expected if name.startswith("gradient")]
    assert kinds == ["gradient auxiliary"] if recipe.stage == "aux_router" else len(kinds) > 3
    assert all(expected[kind] > 0 for kind in kinds)
    for key, value in expected.items():
        wanted, got = (value[0], found[key][0]) if "sums" in key else (value, found[key])
        # Norms before clipping and Adam, which hide a wrong scale of the gradient.
        torch.testing.assert_close(got, wanted, rtol=10 * near, atol=1e-6)
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    models = [recipe.build_model(vocabulary) for _ in range(2)]
    for model, folder in zip(models, (out, single), strict=True):
        load_model(folder / f"step-{STEPS:08d}", model, ONE_PROCESS)
    for (name, value), other in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(value, other, atol=near, rtol=10 * near, msg=name)
    for router, other_router in zip(*(model.token_routers() for model in models), strict=True):
        assert torch.equal(router.bias_O, other_router.bias_O)
        assert bool(router.bias_O.any()) == (router.config.bias_rate > 0)
    # The shards of all ranks can be read without a model, too.
    stored = stored_weights(out / f"step-{STEPS:08d}")
    assert stored.meta_tensors.keys() == models[0].state_dict().keys()
    for name, value in stored.read(stored.meta_tensors).items():
        assert torch.equal(value, models[0].state_dict()[name])


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_on_the_same_token_groups(tiny, two, one, name):
    groups, _, near = CASES[name]
    recipe = recipe_of(tiny, groups, EngineConfig(), stage_of(name))
    if near > 1e-5:  # low precision: losses and norms, not each weight
        expected, found = load(one(recipe) / "found-1.pt"), load(two / name / "found-2.pt")
        torch.testing.assert_close(found["sums"][0], expected["sums"][0], rtol=near, atol=0)
        # Adam hides the scale of gradients: their norms show it.
        for key in (key for key in expected if "norm" in key or key.startswith("gradient")):
            torch.testing.assert_close(found[key], expected[key], rtol=0.25, atol=2e-2)
        assert not torch.equal(found["1 sums"], expected["1 sums"])
    else:
        assert_equals_one_process(recipe, one(recipe), two / name, 2, near)


def test_gradients_are_summed_in_bf16_if_there_are_several_machines(two):
    forced, several = (load(two / name / "found-2.pt") for name in ("reduce", "several"))
    assert all(torch.equal(value, several[key]) for key, value in forced.items())


def test_hybrid_sharding_equals_one_process(tiny, four, one):
    recipe = recipe_of(tiny, "moe_2t2i", EngineConfig())
    assert_equals_one_process(recipe, one(recipe), four, 4, 1e-5)


@pytest.mark.parametrize("name", ["sharded", "hybrid"])
def test_four_ranks_resume_a_checkpoint_of_two(two, four, name):
    expected, found = load(two / "moe_2t2i" / "found-2.pt"), load(four / f"{name}.pt")
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_one_rank_resumes_a_checkpoint_of_two(tiny, two):
    found = resume_step(ONE_PROCESS, recipe_of(tiny, "moe_2t2i", EngineConfig()), two / "moe_2t2i")
    expected = load(two / "moe_2t2i" / "found-2.pt")
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def test_a_run_resumes_on_another_number_of_ranks(tiny, two, tmp_path):
    whole = Run(two / "run").read_metrics()
    assert [record["step"] for record in whole] == [2, 4, 6, 8]
    run = Run(tmp_path / "run")
    shutil.copytree(two / "run", run.path)
    shutil.rmtree(checkpoints_in(run.checkpoints)[-1])
    train(tiny.model_copy(update={"run": run.path}), ONE_PROCESS, quiet=True)
    records = run.read_metrics()
    # Its random numbers differ from those of the ranks before.
    assert torch.initial_seed() not in (tiny.seed, tiny.seed + 1)
    # A step has as many tokens as before: one rank computes the micro-batches of two.
    assert [record["tokens"] for record in records] == [record["tokens"] for record in whole]
    assert records[:2] == whole[:2] and records[-1]["loss"] < records[1]["loss"]
    assert len(read_rank_states(checkpoints_in(run.checkpoints)[-1])) == 1


def test_a_step_may_grow_with_the_number_of_ranks(tiny, two, four):
    message = (four / "refused").read_text()
    one = tiny.data.micro_batch_size * tiny.data.sequence_length
    assert "4 ranks cannot share the 2 micro-batches of a step; use a divisor of 2" in message
    assert f"to keep {2 * one:,} tokens per step" in message
    assert f"engine.step_size=grows to 4 times 1 micro-batches, {4 * one:,} tokens" in message
    tokens = [record["tokens"] for record in Run(two / "larger").read_metrics()]
    assert tokens == [4 * one, 8 * one, 16 * one, 24 * one]


def test_resumed_training_is_equal_on_one_rank_and_on_four(tiny, two, four, tmp_path):
    """Counters, schedule, optimizer, scale of the gradient and log records."""
    whole = Run(two / "fixed")
    assert_resumed_equals(whole, Run(four / "fixed"))
    assert_resumed_equals(whole, train_fixed(ONE_PROCESS, tiny, copy_half(two, tmp_path / "run")))


def test_one_rank_upcycles_the_seed_run_of_two(tiny, two, tmp_path):
    seed = Run(two / "seed")
    stage = tiny.pretrain.model_copy(update={"steps": 2, "checkpoint_every": 2})
    grown = recipe_of(tiny, "moe_2t2i", EngineConfig())
    changes = {"run": tmp_path / "run", "stage": "upcycle", "from_": seed.path, "upcycle": stage}
    run = train(grown.model_copy(update=changes), ONE_PROCESS, quiet=True)
    (record,) = run.read_metrics()
    tokens = 2 * tiny.data.micro_batch_size * tiny.data.sequence_length
    assert record["tokens"] == seed.read_metrics()[-1]["tokens"] + tokens
    # Its documents are those that neither rank of the seed run had seen.
    states = [state["data"] for state in read_rank_states(checkpoints_in(seed.checkpoints)[-1])]
    ((wanted,), (found,)) = (
        reshard(states, 1),
        [state["data"] for state in read_rank_states(checkpoints_in(run.checkpoints)[-1])],
    )
    for stream in ("with_images", "text"):
        assert sum(wanted[stream]["base"]) > 0
        assert found[stream]["base"] == wanted[stream]["base"]


def test_sequential_groups_are_gathered_one_by_one(two):
    units = json.loads((two / "units.json").read_text())
    layers = ["", "layers.0", "layers.1"]
    assert sorted(units["batched"]) == layers
    groups = [f"layers.{n}.experts.groups.{g}" for n in range(2) for g in range(2)]
    assert sorted(units["sequential"]) == sorted([*layers, *groups])


def test_impossible_replicas_are_refused(tiny):
    recipe = recipe_of(tiny, "dense", EngineConfig(replicate=2))
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    with pytest.raises(UserError, match=r"engine\.replicate: 1 ranks cannot hold 2 replicas"):
        prepare_model(recipe, vocabulary, ONE_PROCESS)
