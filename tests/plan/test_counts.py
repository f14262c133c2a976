"""Counts of the paper's recipes against its Table 1."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moma.cli import app
from moma.model.transformer import Transformer
from moma.plan.counts import plan
from moma.recipe import read_recipe
from moma.train.recipe import Recipe
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary(65_536, range(4, 4 + 8192), 1024, end_image=8196)
CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
SIZES = ("90m", "435m", "1b4")
# Millions of parameters: dense, 8 experts, MoD, MoD with 8 experts. By its dimensions, the 1.4B
# dense model of the table has 1.48B.
TABLE = {
    "90m": (90, 210, 110, 317),
    "435m": (435, 1900, 635, 3000),
    "1b4": (1480, 7100, 2300, 12000),
}
EIGHT = ("moe_8x", "moe_4t4i", "moe_7t1i", "moe_6t2i")
WIDE = ("dense", "moe_1t1i", *EIGHT)
WITH_DEPTH = ("mod", "mod_moe_1t1i", "mod_moe_4t4i")


def recipe_of(size: str, architecture: str) -> Recipe:
    return read_recipe(Recipe, CONFIGS / f"{size}_{architecture}.toml")


def test_every_cell_of_the_table_has_a_recipe():
    names = {path.stem for path in CONFIGS.glob("*.toml")}
    assert names == {f"{size}_{name}" for size in SIZES for name in (*WIDE, *WITH_DEPTH)}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(path):
    recipe = read_recipe(Recipe, path)
    assert recipe.model.groups == path.stem.split("_", 1)[1]
    assert recipe.run == Path("runs/paper") / path.stem
    found = plan(recipe)
    for key in ("parameters", "active_parameters", "flops_per_token"):
        assert found[key] == pytest.approx(sum(found["parts"][key].values()), abs=10)
    assert found["layers"]["full"] + found["layers"]["mod"] == recipe.model.layers
    settings = recipe.pretrain
    size = path.stem.split("_")[0]
    million = 8.388608 if size == "1b4" else 6.291456
    assert 256 * found["tokens_per_step"] == pytest.approx(million * 1e6)
    assert settings.steps == (120_000 if size == "1b4" else 160_000)
    assert (settings.optimizer.learning_rate, settings.optimizer.warmup) == (1e-4, 4000)
    assert settings.z_loss == 1e-5 and settings.optimizer.epsilon == 1e-5
    assert (recipe.data.sequence_length, recipe.data.image_share) == (4096, 0.5)
    warmup = 2000 if size == "1b4" else 1000
    steps = 10_000 if size == "1b4" and not recipe.model.depth_layers else 5000
    assert (recipe.aux_router.optimizer.warmup, recipe.aux_router.steps) == (warmup, steps)


@pytest.mark.parametrize("size", SIZES)
def test_totals_equal_the_table(size):
    dense, eight, mod, mod_eight = TABLE[size]
    expected = {"dense": dense, "mod": mod, "mod_moe_4t4i": mod_eight} | dict.fromkeys(EIGHT, eight)
    for architecture, millions in expected.items():
        found = plan(recipe_of(size, architecture))["parameters"]
        assert found == pytest.approx(millions * 1e6, rel=0.03), architecture


@pytest.mark.parametrize("size", SIZES)
def test_flops_are_about_equal(size):
    dense = plan(recipe_of(size, "dense"))["flops_per_token"]
    for architecture in WIDE:
        found = plan(recipe_of(size, architecture))["flops_per_token"]
        assert found == pytest.approx(dense, rel=0.01), architecture
    for architecture in WITH_DEPTH:
        found = plan(recipe_of(size, architecture))["flops_per_token"]
        assert found == pytest.approx(dense, rel=0.12), architecture


@pytest.mark.parametrize("size", SIZES)
def test_flops_are_equal_within_2_percent_if_depth_routers_select_by_sequence(size):
    """Then selected tokens attend only within their sequence, as the paper's layers seem to."""
    dense = plan(recipe_of(size, "dense"))["flops_per_token"]
    overrides = ["model.depth.scope=sequence"]
    mod = plan(read_recipe(Recipe, CONFIGS / f"{size}_mod.toml", overrides))["flops_per_token"]
    assert mod == pytest.approx(dense, rel=0.02)


@pytest.mark.parametrize("architecture", ["moe_4t4i", "mod", "mod_moe_1t1i"])
def test_parts_by_kind_of_layer_add_up(architecture):
    recipe = recipe_of("90m", architecture)
    found = plan(recipe)
    assert found["parts_by_layer"].keys() == found["parts"].keys()
    for key, by_kind in found["parts_by_layer"].items():
        assert list(by_kind) == ["full", "mod", "outside"]
        for part, total in found["parts"][key].items():
            assert sum(kind.get(part, 0) for kind in by_kind.values()) == pytest.approx(
                total, abs=2
            )
    with torch.device("meta"):
        model = Transformer(recipe.model, VOCABULARY, recipe.shares)
    held = {"full": 0, "mod": 0, "outside": 0}
    for name, parameter in model.named_parameters():
        if ".auxiliary." not in name:
            in_layer = name.startswith("layers.")
            with_depth = in_layer and int(name.split(".")[1]) in recipe.model.depth_layers
            held["mod" if with_depth else "full" if in_layer else "outside"] += parameter.numel()
    by_kind = found["parts_by_layer"]["parameters"]
    assert {kind: sum(parts.values()) for kind, parts in by_kind.items()} == held
    # A quarter of the tokens is processed; the depth router itself reads every token.
    active, whole = (found["parts_by_layer"][key] for key in ("active_parameters", "parameters"))
    assert active["mod"]["attention"] == whole["mod"]["attention"] / 4
    assert active["mod"]["depth"] == whole["mod"]["depth"]
    flops = found["parts_by_layer"]["flops_per_token"]
    assert (flops["mod"]["experts"] > 0) == (found["layers"]["mod"] > 0)
    assert flops["mod"]["experts"] * found["layers"]["full"] == pytest.approx(
        flops["full"]["experts"] * found["layers"]["mod"] / 4, rel=1e-3
    )


@pytest.mark.parametrize("architecture", ["dense", "moe_6t2i", "mod_moe_4t4i"])
def test_a_planned_model_has_the_counted_parameters(architecture):
    recipe = recipe_of("435m", architecture)
    found = plan(recipe)
    with torch.device("meta"):
        model = Transformer(recipe.model, VOCABULARY, recipe.shares)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == found["parameters"] + found["auxiliary_parameters"]


def test_plan_prints_one_object_and_accepts_overrides():
    run = CliRunner().invoke
    arguments = ["plan", str(CONFIGS / "90m_dense.toml"), "--json"]
    small = json.loads(run(app, [*arguments, "model.layers=4"]).stdout)
    assert small["layers"] == {"full": 4, "mod": 0}
    whole = json.loads(run(app, arguments).stdout)
    assert whole["parameters"] == plan(recipe_of("90m", "dense"))["parameters"]
    table = run(app, arguments[:2]).stdout
    assert all(words in table for words in ("attention", "92.4M", "GFLOPs per token"))
    assert "layers " not in table.split("all")[0]
    table = run(app, ["plan", str(CONFIGS / "90m_mod.toml")]).stdout
    assert all(words in table for words in ("in 7 full layers", "in 7 mod layers", "depth"))
