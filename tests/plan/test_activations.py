"""Planned activations against the memory of a real step."""

from typing import Any

import pytest
import torch

from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.plan.activations import activation_bytes
from moma.runtime.peak import allocated_peak
from moma.runtime.sharding import EngineConfig
from moma.runtime.world import World
from moma.train.recipe import Recipe
from moma.train.stages import loss_function_of, prepare_model
from moma.train.step import to_device
from tests.factories import synthetic_recipe

CPU = torch.device("cpu")
NEAR = 0.15
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dense": ("dense", "none", {}),
    "dense, layer": ("dense", "layer", {}),
    "dense, selective": ("dense", "selective", {}),
    "moe_4t4i": ("moe_4t4i", "none", {}),
    "moe_4t4i, layer": ("moe_4t4i", "layer", {}),
    "moe_4t4i, selective": ("moe_4t4i", "selective", {}),
    "moe_1t1i": ("moe_1t1i", "none", {}),
    "mod_moe_1t1i": ("mod_moe_1t1i", "none", {}),
    "mod_moe_4t4i": ("mod_moe_4t4i", "none", {}),
    "mod_moe_4t4i, layer": ("mod_moe_4t4i", "layer", {}),
    "mod_moe_4t4i, selective": ("mod_moe_4t4i", "selective", {}),
    "few key heads": ("moe_4t4i", "none", {"kv_heads": 2, "query_key_norm": False}),
    "one key head": ("dense", "none", {"kv_heads": 1, "query_key_norm": False}),
    "pre-norm, causal mask": ("dense", "none", {"norm": "pre", "attention_mask": "causal"}),
    "batched": ("moe_4t4i", "none", {"experts_implementation": "batched"}),
    "grouped": ("moe_8x", "none", {"experts_implementation": "grouped"}),
}
# What they are made of is in other cases.
COMBINED = {
    "dense, layer", "dense, selective", "moe_1t1i", "moe_4t4i, layer", "moe_4t4i, selective",
}  # fmt: skip


def recipe_of(groups: str, recompute: str, compiled: bool, **model) -> Recipe:
    return synthetic_recipe(
        codes=64,
        image_share=0.5,
        sequence_length=256,
        model={"groups": groups, "dim": 64, "layers": 3, "heads": 4, **model},
        engine={"recompute": recompute},
        pretrain={"compile": compiled},
    )


def measured(recipe: Recipe) -> int:
    """Return the peak memory of forward and backward, without gradients of weights."""
    vocabulary = synthetic_vocabulary(recipe)
    model = prepare_model(recipe, vocabulary, World(CPU))
    loss_function = loss_function_of(recipe, CPU)
    batch = to_device(synthetic_batches(recipe, vocabulary).pack(), CPU)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def job() -> None:
        loss_function(model, batch).objective.backward()

    job()
    return allocated_peak(job, CPU)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in COMBINED else name for name in CASES],
)
def test_a_real_step_needs_the_planned_memory(name):
    groups, recompute, model = CASES[name]
    recipe = recipe_of(groups, recompute, compiled=False, **model)
    assert activation_bytes(recipe, CPU) == pytest.approx(measured(recipe), rel=NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_step_needs_the_planned_memory(name):
    torch.compiler.reset()
    groups, recompute, model = CASES[name]
    recipe = recipe_of(groups, recompute, compiled=True, **model)
    assert activation_bytes(recipe, CPU) == pytest.approx(measured(recipe), rel=NEAR)


def test_recomputing_and_compiling_save_memory():
    def planned(recompute: str, compiled: bool) -> int:
        return activation_bytes(recipe_of("moe_4t4i", recompute, compiled), CPU)

    for compiled in (False, True):
        none, selective, layer = (planned(a, compiled) for a in ("none", "selective", "layer"))
        assert none > selective > layer
    assert planned("none", False) > planned("none", True)


@pytest.mark.parametrize(
    ("device", "compute", "mask", "repeats"),
    [
        ("cuda", "bf16", "document", True),  # flash attention
        ("cuda", "fp32", "document", False),  # flex_attention
        ("cpu", "fp32", "document", True),  # a mask
        ("cpu", "fp32", "causal", False),
    ],
)
def test_keys_and_values_are_counted_as_the_kernel_repeats_them(device, compute, mask, repeats):
    few, all_heads = (
        activation_bytes(
            recipe_of(
                "dense", "none", True, kv_heads=kv_heads, query_key_norm=False, attention_mask=mask
            ).model_copy(update={"engine": EngineConfig(compute=compute)}),
            torch.device(device),
        )
        for kv_heads in (1, 4)
    )
    assert few == all_heads if repeats else few < all_heads
