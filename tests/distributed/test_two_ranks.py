"""Gloo processes: sharded training equals one process on the same groups of tokens.

A step has four micro-batches ("token groups"), divided among one, two or four ranks.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moma.data.batches.iterator import reshard
from moma.errors import UserError
from moma.runs import Run
from moma.runtime.checkpoint import (
    checkpoints_in,
    load_model,
    read_rank_states,
    stored_weights,
)
from moma.runtime.sharding import EngineConfig
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.stages import prepare_model
from moma.vocabulary import Vocabulary
from tests.distributed.jobs import (
    CASES,
    ONE_PROCESS,
    STEPS,
    build,
    copy_half,
    float8_step,
    job_of_four,
    job_of_two,
    recipe_of,
    resume_step,
    stage_of,
    take_steps,
    train_fixed,
)
from tests.processes import on_ranks


def assert_resumed_equals(whole: Run, run: Run) -> None:
    records, others = whole.read_metrics(), run.read_metrics()
    assert [record["step"] for record in others] == [2, 4, 6, 8] and records[:2] == others[:2]
    for record, other in zip(records[2:], others[2:], strict=True):
        for key in ("tokens", "flops", "learning_rate"):
            assert record[key] == other[key]
        for key in ("loss", "loss_text", "loss_image"):
            assert other[key] == pytest.approx(record[key], rel=1e-5)
        assert other["gradient_norm"] == pytest.approx(record["gradient_norm"], rel=1e-4)


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
    assert found == {
        "router": "torch.float32",
        "depth": "torch.float32",
        "query": "torch.bfloat16",
    }


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
    routers, others = (list(model.token_routers()) for model in models)
    for router, other_router in zip(routers, others, strict=True):
        assert torch.equal(router.bias_O, other_router.bias_O)
    has_bias = any(router.config.bias_rate > 0 for router in routers)
    assert any(bool(router.bias_O.any()) for router in routers) == has_bias
    # The shards of all ranks can be read without a model, too.
    stored = stored_weights(out / f"step-{STEPS:08d}")
    assert stored.meta_tensors.keys() == models[0].state_dict().keys()
    for name, value in stored.read(stored.meta_tensors).items():
        assert torch.equal(value, models[0].state_dict()[name])


@pytest.mark.parametrize("groups", sorted({groups for groups, *_ in CASES.values()}))
@torch.no_grad()
def test_no_selection_is_a_close_call(tiny, groups):
    """A token selected instead of another would change the outputs by about 1."""
    model, _, _, streams = build(recipe_of(tiny, groups, EngineConfig()), ONE_PROCESS)
    parts = [
        [torch.from_numpy(part) for part in (b.tokens_BS, b.document_ids_BS, b.positions_BS)]
        for b in (next(stream) for _ in range(STEPS + 1) for stream in streams)
    ]
    outputs = [model(*part).head for part in parts]
    for weight in model.parameters():
        weight.mul_(1 + 1e-5 * torch.randn_like(weight))
    for part, output in zip(parts, outputs, strict=True):
        torch.testing.assert_close(model(*part).head, output, atol=1e-2, rtol=0)


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


def test_sharded_experts_compute_in_float8_as_those_of_one_process(tiny, two):
    found = load(two / "float8.pt")
    expected, exact = (float8_step(tiny, how, ONE_PROCESS) for how in ("emulate", "off"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    kinds = [name for name in found if name.startswith("gradient")]
    assert len(kinds) > 3
    for key in ("sums", *kinds):
        assert not torch.allclose(found[key], exact[key], rtol=1e-4), key


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


def test_the_global_batch_size_may_grow(tiny, two, four):
    message = (four / "refused").read_text()
    one = tiny.data.micro_batch_size * tiny.data.sequence_length
    assert "4 ranks cannot share the 2 micro-batches of a step; use a divisor of 2" in message
    assert f"to keep {2 * one:,} tokens per step" in message
    assert "engine.global_batch_size=grows, for steps of 4 times 1 micro-batches" in message
    assert message.endswith(f"{4 * one:,} tokens")
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
