"""Counts from the configuration against built modules and the flop counter."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moma.model import routing
from moma.model.architecture import ModelConfig
from moma.model.depth import DepthConfig
from moma.model.flops import ModelCounts, sum_over_kinds
from moma.model.groups import GroupConfig
from moma.model.routing import ExpertChoice, Routing, uniform_routing
from moma.model.transformer import Transformer, no_head
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary(codes=range(20, 40))
SHARES = (0.5, 0.5)
OVERLAPPING = (
    GroupConfig(modalities=("text",), experts=3),
    GroupConfig(modalities=("image",), experts=1),
    GroupConfig(modalities=("text", "image"), experts=1),
    GroupConfig(modalities=("text", "image"), experts=2),
)
CASES: dict[str, dict[str, Any]] = {
    **{
        name: {"groups": name}
        for name in (
            "dense", "moe_4x", "moe_1t1i", "moe_2t2i", "moe_3t1i",
            "mod", "mod_moe_4x", "mod_moe_1t1i", "mod_moe_2t2i",
            "token_2t2i", "null_4x", "mod_token_3t1i",
        )
    },
    "overlapping": {"groups": OVERLAPPING},
    "overlapping_mod": {
        "groups": OVERLAPPING,
        "depth": DepthConfig(capacity_factor=0.5, layers=(1,)),
    },
    "sequential": {"groups": "mod_moe_1t1i", "experts_implementation": "sequential"},
    "batched": {"groups": "mod_moe_1t1i", "experts_implementation": "batched"},
    "unequal_grouped": {"groups": "mod_moe_3t1i", "experts_implementation": "grouped"},
    "by_sequence": {
        "groups": "mod_moe_2t2i",
        "depth": DepthConfig(capacity_factor=0.3, scope="sequence"),
    },
    "grouped_queries": {"groups": "mod_moe_1t1i", "kv_heads": 1},
    "tied": {"groups": "moe_2t2i", "tied_embeddings": True, "query_key_norm": False},
    "pre": {"groups": "mod", "norm": "pre", "dropout": 0.1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def routers_as_matrices(monkeypatch):
    """The counter skips matrix-vector products; as matrices, routers have as many operations."""
    monkeypatch.setattr(routing, "FEW_EXPERTS", 0)


def build(case: str) -> Transformer:
    config = ModelConfig.model_validate({"dim": 16, "layers": 3, "heads": 2} | CASES[case])
    model = Transformer(config, VOCABULARY, SHARES)
    model.initialize(0)
    return model.eval()


def counts_of(config: ModelConfig, sequences: int = 4, length: int = 16) -> ModelCounts:
    return ModelCounts(config, VOCABULARY.size, SHARES, sequences, length)


def half_image_tokens(sequences: int, length: int) -> torch.Tensor:
    """Return tokens of which exactly half are image codes."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randperm(sequences * length, generator=generator) % 2
    ids = (3 + torch.arange(sequences * length) % 17 + kinds * 20).clamp(max=39)
    return ids.view(sequences, length)


def counted_by_torch(model: Transformer, tokens: torch.Tensor, routing: Routing) -> int:
    # The fused CPU kernel is not counted by the counter; the plain products are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, routing=routing)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_exact(case):
    model = build(case)
    auxiliary = sum(p.numel() for r in model.auxiliary_routers() for p in r.parameters())
    parts = sum_over_kinds(counts_of(model.config).parameters())
    assert auxiliary == counts_of(model.config).auxiliary_parameters()
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters()) - auxiliary
    by_name = {"attention": ".attention.", "depth": ".depth.router", "routers": "experts.groups"}
    for part, name in by_name.items():
        numbers = [
            p.numel()
            for key, p in model.named_parameters()
            if name in key and (part != "routers" or key.endswith("router.weight"))
        ]
        assert parts[part] == sum(numbers)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("sequences", "length"), [(4, 16), (12, 8)])  # without and with windows
def test_forward_flops_equal_the_flop_counter(case, sequences, length):
    model, tokens = build(case), half_image_tokens(sequences, length)
    found = counted_by_torch(model, tokens, Routing())
    counts = counts_of(model.config, sequences, length)
    parts, empty = sum_over_kinds(counts.forward_flops()), counts.empty_slot_flops()
    masked = masked_flops(counts)
    assert sum(parts.values()) + empty + masked == pytest.approx(found, rel=0.01)
    if case == "mod_moe_1t1i":  # one grouped product shares the slots
        assert empty == 0
    if case == "sequential":  # actual capacity has no empty slots
        assert empty > 0
        actual = counted_by_torch(model, tokens, uniform_routing(ExpertChoice("actual")))
        assert sum(parts.values()) + masked == pytest.approx(actual, rel=0.01)


@pytest.mark.parametrize("case", CASES)
def test_flops_of_a_token_do_not_depend_on_the_micro_batch_size(case):
    config = build(case).config
    one, six = (counts_of(config, size, 4096).training_flops_per_token() for size in (1, 6))
    assert six == pytest.approx(one, rel=1e-3)


def masked_flops(counts: ModelCounts) -> int:
    """Products between selected tokens of different sequences, which a CPU masks."""
    depth, kind = counts.config.depth_config, counts.layer_kinds()["mod"]
    if depth is None or depth.scope == "sequence":
        return 0
    return kind.layers * 4 * counts.config.dim * (kind.tokens**2 - kind.pairs)


def counted_by_part(model: Transformer, tokens: torch.Tensor) -> dict[str, int]:
    """Return what the counter finds in the modules of each part."""

    def product_with_vector(matrix, vector, *_, **__):  # of a depth router; the counter skips it
        return 2 * matrix[0] * matrix[1]

    extra = {torch.ops.aten.mv: product_with_vector}
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=extra) as counter,
    ):
        model(tokens)

    def inside(*ends: str, of: Any = None) -> int:
        return sum(
            each.get(of, 0) if of else sum(each.values())
            for name, each in counter.get_flop_counts().items()
            if name.endswith(ends)
        )

    # In experts, only main routers and dense groups multiply two matrices; others multiply stacks.
    mm = torch.ops.aten.mm
    routers = inside(".experts", of=mm) - inside(".gate", ".up", ".down", of=mm)
    return {
        "attention": inside(".attention"),
        "routers": routers,
        "experts": inside(".experts") - routers,
        "depth": inside(".depth"),
        "head": counter.get_total_flops() - inside(".attention", ".experts", ".depth"),
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("sequences", "length"), [(4, 16), (12, 8)])
def test_every_part_equals_the_flop_counter(case, sequences, length):
    model = build(case)
    found = counted_by_part(model, half_image_tokens(sequences, length))
    counts = counts_of(model.config, sequences, length)
    parts = sum_over_kinds(counts.forward_flops())
    parts["experts"] += counts.empty_slot_flops()
    parts["attention"] += masked_flops(counts)
    assert found == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("case", ["moe_2t2i", "mod_moe_2t2i", "grouped_queries", "sequential"])
def test_backward_costs_twice_the_forward(case):
    model = build(case)
    tokens = half_image_tokens(4, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).head.sum().backward()
    counts = counts_of(model.config)
    counted = 64 * counts.training_flops_per_token()
    counted += 3 * (counts.empty_slot_flops() + masked_flops(counts))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("case", ["moe_3t1i", "mod", "mod_moe_2t2i", "by_sequence"])
def test_router_stage_flops_equal_the_flop_counter(case):
    model = build(case).requires_grad_(False)
    for router in model.auxiliary_routers():
        router.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        routing = Routing(record_auxiliary=True)
        records = model(half_image_tokens(4, 16), routing=routing, head=no_head).routers
        torch.stack([record.auxiliary_logits_NE.sum() for record in records]).sum().backward()
    counts = counts_of(model.config)
    counted = 64 * counts.router_stage_flops_per_token()
    counted += counts.empty_slot_flops() + masked_flops(counts)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_active_parameters():
    def active(case):
        counts = ModelCounts(build(case).config, VOCABULARY.size, (0.75, 0.25), 4, 16)
        return sum_over_kinds(counts.active_parameters())

    def total(case):
        return sum_over_kinds(counts_of(build(case).config).parameters())

    assert active("dense") == total("dense")
    assert active("moe_1t1i") == total("dense")
    assert active("moe_3t1i")["experts"] == total("dense")["experts"]
    assert active("moe_3t1i")["routers"] == 0.75 * total("moe_3t1i")["routers"]
    mod, dense = (
        active("mod_moe_2t2i"),
        total("dense"),
    )  # layers 0, 2: a quarter of the tokens
    assert mod["attention"] == pytest.approx(dense["attention"] * (1 + 2 / 4) / 3)
    assert mod["depth"] == 2 * 16
    for case in ("token_2t2i", "null_4x"):  # null: two of four real and four null experts
        assert active(case)["experts"] == pytest.approx(total("dense")["experts"])
    assert total("null_4x")["routers"] == total("moe_4x")["routers"] * 5 / 4
    assert active("overlapping")["experts"] == 3 * total("dense")["experts"]


def test_parameters_that_some_of_three_tokens_use():
    """Every combination of which tokens choose a layer or expert, weighted by its probability."""
    model = build("mod_moe_2t2i").config
    shares, tokens = (0.75, 0.25), 3
    counts = ModelCounts(model, VOCABULARY.size, shares, 4, 16)
    found, whole = counts.active_parameters(tokens), counts.parameters()

    def used(probability):
        return sum(
            math.prod(probability if chosen else 1 - probability for chosen in combination)
            for combination in itertools.product((True, False), repeat=tokens)
            if any(combination)
        )

    for kind, fraction in (("full", 1), ("mod", 0.25)):
        experts = sum(used(fraction * share / 2) for share in shares) / 2
        assert found[kind]["experts"] == pytest.approx(whole[kind]["experts"] * experts)
        routers = sum(used(fraction * share) for share in shares) / 2
        assert found[kind]["routers"] == pytest.approx(whole[kind]["routers"] * routers)
        layer = used(fraction)
        assert found[kind]["attention"] == pytest.approx(whole[kind]["attention"] * layer)
    assert found["mod"]["depth"] == whole["mod"]["depth"]


@pytest.mark.parametrize("sparse_groups", ["moe_4t4i", "token_4t4i", "null_8x", "null_4t4i"])
def test_experts_have_the_flops_of_dense(sparse_groups):
    dense, sparse = (
        sum_over_kinds(
            ModelCounts(ModelConfig(groups=groups), 65_536, SHARES, 6, 4096).forward_flops()
        )
        for groups in ("dense", sparse_groups)
    )
    assert sparse["experts"] == dense["experts"]
    assert sum(sparse.values()) == pytest.approx(sum(dense.values()), rel=0.01)
