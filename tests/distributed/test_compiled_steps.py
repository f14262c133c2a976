"""Compiled training steps of many architectures in one process, alone and on two ranks.

Modalities have unequal shares and products are not recomputed, so that the parts of a layer, which
are compiled one by one when it is sharded, have different shapes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.model.groups import named_groups
from moma.runtime.world import World, can_compile
from moma.train.recipe import Recipe
from moma.train.stages import make_step, prepare_model
from tests.factories import synthetic_recipe
from tests.processes import on_ranks

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_compile(CPU), reason="torch.compile does not work here")
SHARED = (*named_groups("moe_2t2i"), *named_groups("dense"))  # a group for all modalities, too
ARCHITECTURES = (
    "dense", "moe_8x", "moe_1t1i", "moe_3t1i", "moe_6t2i", "moe_4t4i",
    "mod", "mod_moe_8x", "mod_moe_1t1i", "mod_moe_3t1i", "mod_moe_4t4i", SHARED,
)  # fmt: skip


def recipe_of(compiled: bool, **model: Any) -> Recipe:
    return synthetic_recipe(
        codes=16,
        image_share=0.25,
        sequence_length=64,
        model={"dim": 16, "layers": 2, "heads": 2, **model},
        engine={"recompute": "selective"},
        pretrain={"compile": compiled, "auxiliary_routers": "mod_" in str(model["groups"])},
    )


def take_steps(world: World, recipe: Recipe) -> list[torch.Tensor]:
    """Return the sums and gradient norms of two steps; the second one compiles nothing."""
    vocabulary = synthetic_vocabulary(recipe)
    model = prepare_model(recipe, vocabulary, world)
    # If groups of experts are sharded, what runs around them is compiled as well.
    has_groups = len(recipe.model.group_list) > 1 and recipe.model.implementation == "sequential"
    is_divided = recipe.pretrain.compile and world.mesh is not None and has_groups
    assert all(("before_experts" in vars(layer)) == is_divided for layer in model.layers)
    step = make_step(recipe, model, world)
    batches = synthetic_batches(recipe, vocabulary, world.rank)
    found: list[torch.Tensor] = []
    compiled = counters["stats"]
    for _ in range(2):
        graphs = compiled["unique_graphs"]
        found += step([batches.pack()], learning_rate=1e-3)
    assert compiled["unique_graphs"] == graphs
    return found


def assert_compiled_steps_equal_eager_ones(
    world: World, models: Sequence[Mapping[str, Any]], backend: str
) -> None:
    for model in models:
        eager = take_steps(world, recipe_of(compiled=False, **model))
        with torch.compiler.set_stance(force_backend=backend):
            compiled = take_steps(world, recipe_of(compiled=True, **model))
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4, msg=str(model))


def test_one_process_compiles_more_variants_than_dynamo_allows_by_default():
    models = [{"groups": "dense", "layers": 1, "dim": dim} for dim in (4, 8, 12)]
    with torch._dynamo.config.patch(recompile_limit=2):  # instead of 8
        assert_compiled_steps_equal_eager_ones(World(CPU), models, "eager")


@pytest.mark.parametrize("groups", ["mod", pytest.param("mod_moe_2t2i", marks=pytest.mark.slow)])
def test_one_process_compiles_several_capacity_factors(groups):
    models = [
        {"groups": groups, "layers": 1, "depth": {"capacity_factor": factor}}
        for factor in (0.25, 0.375)
    ]
    assert_compiled_steps_equal_eager_ones(World(CPU), models, "eager")


def test_two_ranks_compile_the_parts_of_layers():
    depth = {"modality_factors": {"text": 0.25, "image": 0.5}, "router_loss": 0.1}
    models = [
        {"groups": "mod_moe_3t1i", "layers": 1},
        {"groups": "mod_moe_3t1i", "layers": 1, "depth": depth},
    ]
    on_ranks(2, assert_compiled_steps_equal_eager_ones, models, "eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    "groups", ARCHITECTURES, ids=lambda groups: "shared" if groups == SHARED else groups
)
def test_generated_code_of_two_ranks_equals_eager(groups):
    on_ranks(2, assert_compiled_steps_equal_eager_ones, [{"groups": groups}], "inductor")
