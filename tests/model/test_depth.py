"""Mixture-of-depths against a slow reference; who is not chosen is not touched."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moma.model.architecture import ModelConfig
from moma.model.attention import AttentionMask
from moma.model.decoder_layer import DepthLayer, TokenContext, build_layer
from moma.model.depth import DepthConfig, DepthRouter
from moma.model.experts import ExpertGroup
from moma.model.groups import named_groups
from moma.model.layers import rotary_angles
from moma.model.routing import Routing
from moma.vocabulary import IMAGE, MODALITIES, TEXT, Vocabulary
from tests.model.model_reference import Tokens, depth_layer, gate_choice, groups_of, numpy, slots

VOCABULARY = Vocabulary(
    size=40,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=tuple(range(5, 21)),
    codes_per_image=4,
)
DIM = 8
BATCH, CAUSAL = Routing(), Routing(mode="causal")


def gated_layer(groups="mod_moe_2t2i", seed=0, shares=(0.5, 0.5), **changes) -> DepthLayer:
    config = ModelConfig(groups=groups, dim=DIM, hidden=6, layers=1, heads=2, **changes)
    layer = build_layer(0, config, VOCABULARY, shares)
    assert isinstance(layer, DepthLayer)
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.double().eval()


def context_of(modality, documents, positions) -> TokenContext:
    angles = rotary_angles(positions, DIM // 2, 10_000.0)
    return TokenContext(modality, documents, angles, AttentionMask())


@st.composite
def batches(draw):
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    kinds = draw(st.sampled_from([(TEXT, IMAGE), (TEXT,), (IMAGE,), (TEXT, IMAGE, -1), (TEXT, -1)]))
    size = rows * length
    modality = draw(st.lists(st.sampled_from(kinds), min_size=size, max_size=size))
    starts = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    documents = np.cumsum(np.array(starts).reshape(rows, length), axis=1)
    modality = np.array(modality).reshape(rows, length)
    documents[modality < 0] = -1
    positions = np.array([[(row[: s + 1] == row[s]).sum() - 1 for s in range(length)]
                          for row in documents])  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(rows, length, DIM, dtype=torch.float64)
    return x, *(torch.from_numpy(array) for array in (modality, documents, positions))


@settings(max_examples=60, deadline=None)
@given(
    batches(),
    st.sampled_from(["mod", "mod_moe_1t1i", "mod_moe_2t2i", "mod_moe_3x", "mod_moe_2t1i"]),
    st.sampled_from([0.2, 0.25, 0.5, 1.0]),
    st.sampled_from(["batch", "sequence"]),
    st.sampled_from(["swin", "pre"]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_gated_layer_equals_a_slow_reference(batch, groups, share, scope, norm, kv_heads, causal):
    x_BSD, modality, documents, positions = batch
    layer_depth = DepthConfig(capacity_factor=share, scope=scope)
    layer = gated_layer(groups, depth=layer_depth, norm=norm, kv_heads=kv_heads)
    y_BSD, _ = layer(x_BSD, context_of(modality, documents, positions), CAUSAL if causal else BATCH)
    how, x_ND = "causal" if causal else "static", numpy(x_BSD.flatten(0, 1))
    rows, length = modality.shape
    numbers = (part.flatten().numpy() for part in (modality, documents, positions))
    modality_N, document_N, position_N = numbers
    tokens = Tokens(modality_N, np.arange(len(x_ND)) // length, document_N, position_N)
    chosen, score_N = gate_choice(layer.depth, layer_depth, x_ND, tokens, how)
    met = rows * slots(share, length) if scope == "sequence" else slots(share, len(x_ND))
    parts = (layer.experts.groups, named_groups(groups), (0.5, 0.5), MODALITIES)
    expected = depth_layer(layer, groups_of(*parts, how, met, share), x_ND, chosen, score_N, tokens)
    # Angles are computed in fp32.
    np.testing.assert_allclose(numpy(y_BSD.flatten(0, 1)), expected, atol=1e-5)
    others = np.setdiff1d(np.arange(len(x_ND)), chosen)
    assert torch.equal(y_BSD.flatten(0, 1)[others], x_BSD.flatten(0, 1)[others])


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from([0.1, 0.25, 0.6]), st.sampled_from(["batch", "sequence"]))
def test_the_gate_takes_the_highest_also_where_scores_tie(batch, share, scope):
    x_BSD, modality, _, _ = batch
    gate = DepthRouter(DIM, DepthConfig(capacity_factor=share, scope=scope)).double()
    x_BSD = x_BSD.sign() * (x_BSD.abs() > 0.8)  # few values: ties are common
    torch.nn.init.ones_(gate.router.weight)
    eligible = modality >= 0
    selection, report = gate(x_BSD, eligible, Routing(record_auxiliary=True))
    assert not report.nonfinite
    scores_BS = x_BSD.sum(-1)
    chosen_BS = report.record.selected_NE.view(eligible.shape).bool()
    assert not (chosen_BS & ~eligible).any()
    assert selection.token_EK.diff(dim=1).gt(0).all()  # as they stand in the batch
    rows = list(zip(scores_BS, chosen_BS, eligible, strict=True))
    for score, chosen, real in rows if scope == "sequence" else [(scores_BS, chosen_BS, eligible)]:
        slots = math.ceil(share * score.numel() - 1e-9)
        assert int(chosen.sum()) == min(slots, int(real.sum()))
        if chosen.any() and (real & ~chosen).any():
            assert score[chosen].min() >= score[real & ~chosen].max() - 1e-12


def test_both_modalities_compete_for_the_same_slots():
    layer = gated_layer("mod_moe_1t1i")
    x = torch.randn(2, 8, DIM, dtype=torch.float64)
    direction = layer.depth.router.weight[0].detach()
    modality = torch.tensor([[TEXT, IMAGE] * 4] * 2)
    x[modality == IMAGE] += 10 * direction  # the gate wants images alone
    _, reports = layer(
        x,
        context_of(modality, modality * 0, torch.arange(8).expand(2, 8)),
        Routing(record_auxiliary=True),
    )
    chosen = reports[-1].record.selected_NE.view(2, 8).bool()
    assert int(chosen.sum()) == 4 and (modality[chosen] == IMAGE).all()


@pytest.mark.parametrize("of_one_kind", [TEXT, IMAGE])
def test_a_lone_expert_behind_a_gate_has_room_for_all_that_can_come(of_one_kind):
    """All that are chosen, or the recipe's share of the whole batch if that is fewer."""
    layer = gated_layer("mod_moe_1t1i", shares=(0.9, 0.1))
    modality = torch.full((2, 8), of_one_kind)
    selection, _ = layer.depth(torch.randn(2, 8, DIM, dtype=torch.float64), modality >= 0, BATCH)
    group = layer.experts.groups[of_one_kind]
    assert isinstance(group, ExpertGroup)
    tokens = selection.token_EK.numel()
    x_KD, modality_K = torch.zeros(tokens, DIM).double(), torch.zeros(tokens, dtype=torch.long)
    inputs, _ = group.route(x_KD, modality_K, BATCH)
    room = inputs.selection.token_EK.numel()
    of_batch = math.ceil((0.9, 0.1)[of_one_kind] * 16)
    assert room == min(of_batch, selection.token_EK.numel())


def test_padding_changes_nothing_for_real_tokens():
    layer = gated_layer("mod_moe_2t2i", depth=DepthConfig(capacity_factor=0.5))
    modality = torch.tensor([[TEXT, IMAGE, TEXT, IMAGE, -1, -1], [IMAGE, TEXT, -1, -1, -1, -1]])
    documents = torch.where(modality < 0, -1, 0)
    context = context_of(modality, documents, torch.arange(6).expand(2, 6))
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    loud = torch.where((modality < 0)[..., None], 1000 * torch.randn_like(x), x)
    for routing in (BATCH, Routing(capacity="actual"), CAUSAL):
        before, after = layer(x, context, routing)[0], layer(loud, context, routing)[0]
        assert torch.equal(before[modality >= 0], after[modality >= 0])
        assert torch.equal(after[modality < 0], loud[modality < 0])


@pytest.mark.parametrize("groups", ["mod", "mod_moe_1t1i", "mod_moe_2t2i"])
def test_nobody_chosen_leaves_everything_as_it_is(groups):
    layer = gated_layer(groups)
    torch.nn.init.zeros_(layer.depth.auxiliary.output.weight)  # a likelihood of exactly one half
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    modality = torch.tensor([[TEXT, IMAGE] * 2] * 2)
    context = context_of(modality, modality * 0, torch.arange(4).expand(2, 4))
    assert torch.equal(layer(x, context, CAUSAL)[0], x)
    nobody = context_of(modality * 0 - 1, modality * 0 - 1, torch.arange(4).expand(2, 4))
    assert torch.equal(layer(x, nobody, BATCH)[0], x)
    assert torch.equal(layer(x, nobody, Routing(capacity="actual"))[0], x)


def test_actual_capacity_is_a_share_of_the_real_tokens():
    gate = DepthRouter(DIM, DepthConfig(capacity_factor=0.5)).double()
    x, real = torch.randn(2, 8, DIM, dtype=torch.float64), torch.ones(2, 8, dtype=torch.bool)
    real[:, 4:] = False
    for eligible, static, actual in ((torch.ones_like(real), 8, 8), (real, 8, 4)):
        for routing, expected in ((BATCH, static), (Routing(capacity="actual"), actual)):
            selection, _ = gate(x, eligible, routing)
            assert int(selection.filled_EK.sum()) == expected


def test_names_are_short_for_keys():
    named = ModelConfig(groups="mod_moe_2t2i", layers=5)
    groups = (
        {"modalities": ["text"], "experts": 2},
        {"modalities": ["image"], "experts": 2},
    )
    depth = {"capacity_factor": 0.25, "layers": [0, 2, 4], "scope": "batch"}
    spelled = ModelConfig.model_validate({"groups": groups, "depth": depth, "layers": 5})
    assert named.group_list == spelled.group_list
    assert named.depth_layers == spelled.depth_layers == {0, 2, 4}
    assert named.depth_config is not None and named.depth_config.capacity_factor == 0.25
    assert ModelConfig(groups="mod").group_list == ModelConfig(groups="dense").group_list
    assert ModelConfig(groups="mod").has_routers and not ModelConfig(groups="dense").has_routers
    assert ModelConfig(groups="moe_4t4i").depth_config is None


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValidationError, match="no layer 4 among 4"):
        ModelConfig(layers=4, depth=DepthConfig(layers=(0, 4)))
