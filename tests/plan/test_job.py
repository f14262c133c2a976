"""Time, cost and communication of a job against calculations by hand; the printed tables."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moma.cli import app
from moma.errors import UserError
from moma.plan.activations import activation_bytes
from moma.plan.counts import plan
from moma.plan.job import Machine, plan_job
from moma.plan.memory import gathered_bytes, held_bytes, meta_model
from moma.recipe import read_recipe
from moma.train.recipe import Recipe

PAPER = Path(__file__).parents[2] / "configs" / "paper"
SPARSE = PAPER / "1b4_moe_4t4i.toml"
DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "accumulated_gradients",
    "gathered_units",
    "activations",
)


def job_of(path: Path = SPARSE, overrides: tuple[str, ...] = (), **machine):
    return plan_job(read_recipe(Recipe, path, overrides), Machine(**machine))


def test_time_and_cost():
    found = job_of(gpus=256, mfu=0.5, peak=1e15, price=2)["time"]
    tokens = 256 * 8 * 4096
    assert (found["tokens_per_step"], found["tokens"]) == (tokens, 120_000 * tokens)
    assert found["flops"] == found["tokens"] * plan(read_recipe(Recipe, SPARSE))["flops_per_token"]
    hours = found["flops"] / (256 * 0.5e15) / 3600
    assert found["days"] == pytest.approx(hours / 24)
    assert found["cost"] == pytest.approx(512 * hours)
    assert found["step_seconds"] * 120_000 == pytest.approx(3600 * hours)


def test_the_peak_is_by_default_that_of_an_h100_in_the_recipes_precision():
    assert job_of(gpus=8)["machine"]["peak"] == 989e12
    assert job_of(overrides=("engine.compute=fp32",), gpus=8)["machine"]["peak"] == 67e12


def test_memory_is_of_the_largest_rank():
    found = job_of(gpus=256)["memory"]
    assert found["total"] == sum(found[part] for part in PARTS)
    # 21,888 rows of the experts' last matrices are 254 times 86, and 44.
    assert (found["largest_rank"], found["smallest_rank"]) == (0, 255)
    assert found["held_by_largest"] == sum(found[part] for part in PARTS[:3])
    assert found["held_by_largest"] > found["held_by_smallest"]
    one = job_of(gpus=1)["memory"]
    counts = plan(read_recipe(Recipe, SPARSE))
    assert one["gradients"] == 4 * counts["parameters"]
    assert one["parameters"] == one["gradients"] + 4 * counts["auxiliary_parameters"]
    assert not one["fits"] and one["activations"] == found["activations"]


@pytest.mark.parametrize("path", sorted(PAPER.glob("1b4_*.toml")), ids=lambda path: path.stem)
def test_the_largest_recipes_fit_80_gigabytes_with_the_papers_tokens(path):
    """With space left for what is not planned: CUDA contexts, communication buffers, gaps."""
    recipe = read_recipe(Recipe, path)
    model, gpu = meta_model(recipe), torch.device("cuda")
    parts = (
        *held_bytes(model, 256, recipe.pretrain.optimizer)[0].values(),
        gathered_bytes(model, recipe, 256, gpu),
    )
    assert sum(parts) + activation_bytes(recipe, gpu) < 64 * 2**30
    assert 256 * plan(recipe)["tokens_per_step"] == 2**23


def test_replicas_hold_more_and_send_less():
    whole, replicated = (job_of(overrides=(f"engine.replicate={n}",), gpus=16) for n in (1, 2))
    twice = 2 * whole["memory"]["parameters"]
    assert replicated["memory"]["parameters"] == pytest.approx(twice, rel=1e-3)
    assert replicated["communication"]["gathered"] < whole["communication"]["gathered"]
    with pytest.raises(UserError, match=r"replicate: 16 GPUs cannot be divided among 3 copies"):
        job_of(overrides=("engine.replicate=3",), gpus=16)


def test_communication():
    """Two ranks and one layer, which is gathered twice; embedding and head once."""
    overrides = ("model.layers=1", "model.groups=dense", "pretrain.gradient_accumulation_steps=3")
    found = job_of(overrides=overrides, gpus=2, link=1e9)
    counts = plan(read_recipe(Recipe, SPARSE, overrides))["parts"]["parameters"]
    root = counts["embedding"] + counts["head"] + 2048
    layer = sum(counts.values()) - root
    sent = found["communication"]
    assert sent["gathered"] == 3 * 2 * (root + 2 * layer) / 2
    assert sent["reduced"] == 4 * (root + layer) / 2
    assert found["memory"]["accumulated_gradients"] == 4 * (root + layer)
    often = job_of(overrides=(*overrides, "engine.reduce_once=false"), gpus=2)
    assert often["communication"]["reduced"] == 3 * sent["reduced"]
    assert often["memory"]["accumulated_gradients"] == 0
    # Gradients that are summed in bf16 are accumulated in fp32.
    half = job_of(overrides=(*overrides, "engine.reduce=bf16"), gpus=2)
    assert half["communication"]["reduced"] == sent["reduced"] / 2
    assert half["memory"]["accumulated_gradients"] == 4 * (root + layer)
    # So is the default on several machines of eight GPUs.
    several, forced = (
        job_of(overrides=(*overrides, *more), gpus=16) for more in ((), ("engine.reduce=bf16",))
    )
    assert several["communication"] == forced["communication"]
    assert several["memory"] == forced["memory"]
    assert sent["seconds"] == pytest.approx((sent["gathered"] + sent["reduced"]) / 1e9)
    step = found["time"]["step_seconds"]
    assert sent["part_of_step"] == pytest.approx(sent["seconds"] / step)
    single = job_of(gpus=1)["communication"]
    assert single["gathered"] == single["reduced"] == single["part_of_step"] == 0


def test_plan_prints_tables_for_gpus():
    run = CliRunner().invoke
    arguments = ["plan", str(SPARSE), "--gpus", "256", "--price", "3"]
    found = json.loads(run(app, [*arguments, "--json"]).stdout)
    assert found["parameters"] == plan(read_recipe(Recipe, SPARSE))["parameters"]
    assert found["machine"]["gpus"] == 256 and found["machine"]["price"] == 3
    printed = run(app, arguments).stdout
    for words in ("7.13B", "GiB", "gathered units", "days", "1.01T", "256 GPUs"):
        assert words in printed
    tiny = run(app, ["plan", str(DEMO), "--gpus", "8"]).stdout
    assert "MiB" in tiny and "µs" in tiny and "times as long as the step" in tiny
    assert "│ 0 " not in tiny and " 0.00 " not in tiny
    invalid = run(app, [*arguments, "--mfu", "2"])
    assert isinstance(invalid.exception, UserError) and "--mfu" in str(invalid.exception)
