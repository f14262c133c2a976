"""Mixture-of-depths against a slow reference; tokens that are not selected do not change."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moma.errors import UserError
from moma.model.architecture import ModelConfig
from moma.model.decoder_layer import DepthLayer, TokenContext, build_layer
from moma.model.depth import DepthConfig, DepthRouter
from moma.model.experts import ExpertGroup
from moma.model.groups import named_groups
from moma.model.layers import rotary_cos_sin
from moma.model.routing import (
    Auxiliary,
    ExpertChoice,
    Half,
    Routing,
    Threshold,
    uniform_routing,
)
from moma.vocabulary import IMAGE, MODALITIES, TEXT
from tests.factories import make_context, make_vocabulary
from tests.model.model_reference import Tokens, depth_choice, depth_layer, groups_of, numpy, slots

VOCABULARY = make_vocabulary()
DIM = 8
BATCH, CAUSAL = Routing(), uniform_routing(Auxiliary())
ACTUAL = uniform_routing(ExpertChoice("actual"))


def build_depth_layer(groups="mod_moe_2t2i", seed=0, shares=(0.5, 0.5), **changes) -> DepthLayer:
    config = ModelConfig(groups=groups, dim=DIM, hidden=6, layers=1, heads=2, **changes)
    layer = build_layer(0, config, VOCABULARY, shares)
    assert isinstance(layer, DepthLayer)
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.double().eval()


def context_of(modality, documents, positions) -> TokenContext:
    rotary = rotary_cos_sin(positions, DIM // 2, 10_000.0)
    return make_context(modality, documents, rotary)


@st.composite
def batches(draw):
    sequences, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    kinds = draw(st.sampled_from([(TEXT, IMAGE), (TEXT,), (IMAGE,), (TEXT, IMAGE, -1), (TEXT, -1)]))
    size = sequences * length
    modality = draw(st.lists(st.sampled_from(kinds), min_size=size, max_size=size))
    starts = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    documents = np.cumsum(np.array(starts).reshape(sequences, length), axis=1)
    modality = np.array(modality).reshape(sequences, length)
    # Padding ends a sequence.
    modality.sort(axis=1)
    modality = modality[:, ::-1].copy()
    documents[modality < 0] = -1
    positions = np.array(
        [[(each[: s + 1] == each[s]).sum() - 1 for s in range(length)] for each in documents]
    )
    torch.manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(sequences, length, DIM, dtype=torch.float64)
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
def test_depth_layer_equals_a_slow_reference(batch, groups, share, scope, norm, kv_heads, causal):
    x_BSD, modality, documents, positions = batch
    layer_depth = DepthConfig(capacity_factor=share, scope=scope)
    layer = build_depth_layer(groups, depth=layer_depth, norm=norm, kv_heads=kv_heads)
    y_BSD, _ = layer(x_BSD, context_of(modality, documents, positions), CAUSAL if causal else BATCH)
    how, x_ND = "causal" if causal else "static", numpy(x_BSD.flatten(0, 1))
    sequences, length = modality.shape
    parts = (part.flatten().numpy() for part in (modality, documents, positions))
    modality_N, document_N, position_N = parts
    tokens = Tokens(modality_N, np.arange(len(x_ND)) // length, document_N, position_N)
    selected, score_N = depth_choice(layer.depth, layer_depth, x_ND, tokens, how)
    reached = sequences * slots(share, length) if scope == "sequence" else slots(share, len(x_ND))
    experts = groups_of(
        layer.experts.groups, named_groups(groups), (0.5, 0.5), MODALITIES, how, reached, share
    )
    expected = depth_layer(layer, experts, x_ND, selected, score_N, tokens)
    # Angles are computed in fp32.
    np.testing.assert_allclose(numpy(y_BSD.flatten(0, 1)), expected, atol=1e-5)
    others = np.setdiff1d(np.arange(len(x_ND)), selected)
    assert torch.equal(y_BSD.flatten(0, 1)[others], x_BSD.flatten(0, 1)[others])


@settings(max_examples=100, deadline=None)
@given(batches(), st.sampled_from([0.1, 0.25, 0.6]), st.sampled_from(["batch", "sequence"]))
def test_the_depth_router_selects_the_highest_scores_even_with_ties(batch, share, scope):
    x_BSD, modality, _, _ = batch
    router = DepthRouter(DIM, DepthConfig(capacity_factor=share, scope=scope)).double()
    x_BSD = x_BSD.sign() * (x_BSD.abs() > 0.8)  # few values: ties are common
    torch.nn.init.ones_(router.router.weight)
    eligible = modality >= 0
    selection, diagnostics = router(x_BSD, modality, Routing(record_auxiliary=True))
    assert not diagnostics.nonfinite
    scores_BS = x_BSD.sum(-1)
    selected_BS = diagnostics.record.selected_NE.view(eligible.shape).bool()
    assert not (selected_BS & ~eligible).any()
    assert selection.index_EK.diff(dim=1).gt(0).all()  # in batch order
    pools = [(scores_BS, selected_BS, eligible)]
    if scope == "sequence":
        pools = list(zip(scores_BS, selected_BS, eligible, strict=True))
    for score, selected, real in pools:
        capacity = math.ceil(share * score.numel() - 1e-9)
        assert int(selected.sum()) == min(capacity, int(real.sum()))
        if selected.any() and (real & ~selected).any():
            assert score[selected].min() >= score[real & ~selected].max() - 1e-12


def test_noise_changes_the_selection_in_training_only_and_no_cutoff():
    config = DepthConfig(capacity_factor=0.5, noise=True)
    router, x_BSD = DepthRouter(DIM, config).double(), torch.randn(2, 8, DIM, dtype=torch.float64)
    torch.nn.init.normal_(router.router.weight, std=0.1)
    modality = torch.zeros(2, 8, dtype=torch.long)
    plain = DepthRouter(DIM, DepthConfig(capacity_factor=0.5)).double()
    plain.load_state_dict(router.state_dict())
    expected, diagnostics = plain(x_BSD, modality, Routing())
    torch.manual_seed(0)
    found, noisy = router.train()(x_BSD, modality, Routing())
    assert found.index_EK.shape == expected.index_EK.shape
    assert not torch.equal(found.index_EK, expected.index_EK)
    assert torch.equal(noisy.cutoff_E, diagnostics.cutoff_E)
    for routing in (Routing(), uniform_routing(ExpertChoice("actual"))):
        assert torch.equal(router.eval()(x_BSD, modality, routing)[0].index_EK, expected.index_EK)


def test_both_modalities_compete_for_the_same_slots():
    layer = build_depth_layer("mod_moe_1t1i")
    x = torch.randn(2, 8, DIM, dtype=torch.float64)
    direction = layer.depth.router.weight[0].detach()
    modality = torch.tensor([[TEXT, IMAGE] * 4] * 2)
    x[modality == IMAGE] += 10 * direction  # the router prefers images
    _, diagnostics = layer(
        x,
        context_of(modality, modality * 0, torch.arange(8).expand(2, 8)),
        Routing(record_auxiliary=True),
    )
    selected = diagnostics[-1].record.selected_NE.view(2, 8).bool()
    assert int(selected.sum()) == 4 and (modality[selected] == IMAGE).all()


def test_modalities_with_factors_of_their_own_compete_among_themselves():
    """Each has its own slots and cutoff, and causally a token meets its modality's threshold."""
    config = DepthConfig(modality_factors={"text": 0.25, "image": 0.5})
    router = DepthRouter(DIM, config, (0.5, 0.5)).double()
    torch.nn.init.normal_(router.router.weight)
    x = torch.randn(2, 8, DIM, dtype=torch.float64)
    modality = torch.tensor([[TEXT, IMAGE] * 4] * 2)
    x[modality == IMAGE] += 10 * router.router.weight[0].detach()  # the router prefers images
    _, diagnostics = router(x, modality, Routing(record_selection=True))
    selected = diagnostics.record.selected_NE.view(2, 8).bool()
    logits = (x @ router.router.weight[0]).detach()
    for number, slots_ in ((TEXT, 2), (IMAGE, 4)):
        own = logits[modality == number].sort(descending=True).values
        assert torch.equal(
            selected & (modality == number), (modality == number) & (logits >= own[slots_ - 1])
        )
        cutoff = diagnostics.cutoff_E[number].item()
        assert cutoff == pytest.approx(float(own[slots_ - 1] + own[slots_]) / 2)
    router.router.cutoff_means_3E.copy_(
        torch.stack((diagnostics.cutoff_E, torch.ones(2), torch.ones(2)))
    )
    for policy in (Threshold(), Threshold("static")):
        _, causal = router(x, modality, uniform_routing(policy, record_selection=True))
        assert torch.equal(causal.record.selected_NE.view(2, 8).bool(), selected)


@pytest.mark.parametrize("groups", ["mod_moe_2t2i", "mod_moe_1t1i"])
def test_experts_have_slots_for_the_modalities_shares_of_the_selected_tokens(groups):
    factors = {"text": 0.25, "image": 1.0}
    layer = build_depth_layer(
        groups, shares=(0.8, 0.2), depth=DepthConfig(modality_factors=factors)
    )
    assert [group.capacity_share for group in layer.experts.groups] == pytest.approx([0.5, 0.5])


def test_slots_without_a_token_of_their_modality_select_nothing():
    config = DepthConfig(modality_factors={"text": 0.75, "image": 1.0})
    layer = build_depth_layer("mod_moe_1t1i", depth=config)
    modality = torch.tensor([[TEXT] * 7 + [IMAGE], [TEXT] * 6 + [-1] * 2])
    documents = torch.where(modality < 0, -1, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]))
    x = torch.randn(2, 8, DIM, dtype=torch.float64)
    context = context_of(modality, documents, torch.arange(8).expand(2, 8))
    y, diagnostics = layer(x, context, Routing(record_selection=True))
    selected = diagnostics[-1].record.selected_NE.view(2, 8).bool()
    assert int(selected[modality == TEXT].sum()) == 6 and selected[0, 7]
    assert torch.equal(y[~selected], x[~selected]) and not (y[selected] == x[selected]).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"capacity_factor": 0.5}, "replaces capacity_factor"),
        ({"scope": "sequence"}, "scope"),
        ({"modality_factors": {"text": 0.5, "image": 2}}, "less than or equal to 1"),
    ],
)
def test_factors_of_modalities_are_checked(values, message):
    factors = {"modality_factors": {"text": 0.5, "image": 0.5}}
    with pytest.raises(ValidationError, match=message):
        DepthConfig.model_validate(factors | values)


def test_a_config_with_factors_of_modalities_can_be_written_and_read():
    config = DepthConfig(modality_factors={"text": 0.5, "image": 0.25})
    assert DepthConfig.model_validate(config.model_dump()) == config


def test_a_modality_without_a_factor_is_refused():
    with pytest.raises(UserError, match="text, image"):
        build_depth_layer("mod_moe_1t1i", depth=DepthConfig(modality_factors={"text": 0.5}))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_router_loss_is_the_cross_entropy_of_decisions_at_one_half(scope):
    config = DepthConfig(capacity_factor=0.25, scope=scope, router_loss=0.3)
    router = DepthRouter(DIM, config).double()
    torch.nn.init.normal_(router.router.weight, std=0.3)
    x = torch.randn(2, 8, DIM, dtype=torch.float64)
    modality = torch.tensor([[TEXT, IMAGE] * 4, [TEXT] * 5 + [-1] * 3])
    selection, diagnostics = router(x, modality, BATCH)
    taken = set(selection.index_EK[selection.filled_EK].tolist())
    losses = []
    for n, (x_D, kind) in enumerate(zip(x.flatten(0, 1), modality.flatten(), strict=True)):
        if kind >= 0:
            score = torch.sigmoid(x_D @ router.router.weight[0])
            losses.append(-torch.log(score if n in taken else 1 - score))
    torch.testing.assert_close(diagnostics.loss, 0.3 * torch.stack(losses).mean())
    assert router.eval()(x, modality, BATCH)[1].loss is None
    for policy in (ExpertChoice("actual"), Threshold("static")):  # the latter in the last steps
        assert router.train()(x, modality, uniform_routing(policy))[1].loss is not None
    assert router(x, modality, CAUSAL)[1].loss is None


def test_half_takes_scores_above_one_half():
    router = DepthRouter(DIM, DepthConfig()).double()
    x, modality = torch.randn(2, 8, DIM, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.long)
    modality[1, 5:] = -1
    routing = Routing(depth=Half(), record_selection=True)
    _, diagnostics = router(x, modality, routing)
    expected = (torch.sigmoid(x @ router.router.weight[0].double()) > 0.5) & (modality >= 0)
    assert torch.equal(diagnostics.record.selected_NE.view(2, 8).bool(), expected)


@pytest.mark.parametrize("only", [TEXT, IMAGE])
def test_a_single_expert_has_a_slot_for_every_selected_token_of_its_modality(only):
    """All selected tokens, or the modality's share of the whole batch if that is fewer."""
    layer = build_depth_layer("mod_moe_1t1i", shares=(0.9, 0.1))
    modality = torch.full((2, 8), only)
    selection, _ = layer.depth(torch.randn(2, 8, DIM, dtype=torch.float64), modality, BATCH)
    group = layer.experts.groups[only]
    assert isinstance(group, ExpertGroup)
    tokens = selection.index_EK.numel()
    x_KD, modality_K = torch.zeros(tokens, DIM).double(), torch.zeros(tokens, dtype=torch.long)
    inputs, _ = group.route(x_KD, group.find_tokens(modality_K, BATCH), BATCH)
    in_batch = math.ceil((0.9, 0.1)[only] * 16)
    assert inputs.selection.index_EK.numel() == min(in_batch, tokens)


def test_padding_does_not_affect_other_tokens():
    layer = build_depth_layer("mod_moe_2t2i", depth=DepthConfig(capacity_factor=0.5))
    modality = torch.tensor([[TEXT, IMAGE, TEXT, IMAGE, -1, -1], [IMAGE, TEXT, -1, -1, -1, -1]])
    documents = torch.where(modality < 0, -1, 0)
    context = context_of(modality, documents, torch.arange(6).expand(2, 6))
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    changed = torch.where((modality < 0)[..., None], 1000 * torch.randn_like(x), x)
    for routing in (BATCH, ACTUAL, CAUSAL):
        before, after = layer(x, context, routing)[0], layer(changed, context, routing)[0]
        assert torch.equal(before[modality >= 0], after[modality >= 0])
        assert torch.equal(after[modality < 0], changed[modality < 0])


@pytest.mark.parametrize("groups", ["mod", "mod_moe_1t1i", "mod_moe_2t2i"])
def test_without_selected_tokens_nothing_changes(groups):
    layer = build_depth_layer(groups)
    torch.nn.init.zeros_(layer.depth.auxiliary.output.weight)  # a(x) is exactly 0.5
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    modality = torch.tensor([[TEXT, IMAGE] * 2] * 2)
    context = context_of(modality, modality * 0, torch.arange(4).expand(2, 4))
    assert torch.equal(layer(x, context, CAUSAL)[0], x)
    all_padding = context_of(modality * 0 - 1, modality * 0 - 1, torch.arange(4).expand(2, 4))
    assert torch.equal(layer(x, all_padding, BATCH)[0], x)
    assert torch.equal(layer(x, all_padding, ACTUAL)[0], x)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("threshold", [-0.5, 0.5, 100.0])
def test_tokens_do_not_attend_to_slots_that_a_threshold_leaves_empty(scope, threshold):
    """With enough slots the result is that of thresholds without a capacity."""
    layer = build_depth_layer("mod_moe_1t1i", depth=DepthConfig(capacity_factor=1, scope=scope))
    layer.depth.router.cutoff_means_3E.copy_(torch.tensor([[threshold], [1.0], [1.0]]))
    x = torch.randn(2, 12, DIM, dtype=torch.float64) / 3
    modality = torch.tensor([[TEXT, IMAGE] * 5 + [-1] * 2, [IMAGE] * 12])
    documents = torch.tensor([[0] * 5 + [1] * 5 + [-1] * 2, [0] * 3 + [1] * 9])
    context = context_of(modality, documents, torch.arange(12).expand(2, 12))
    limited, unlimited = (
        layer(x, context, uniform_routing(policy))[0]
        for policy in (Threshold("static"), Threshold())
    )
    torch.testing.assert_close(limited, unlimited)
    assert torch.equal(limited, x) == (threshold == 100.0)


def test_actual_capacity_counts_only_tokens_that_are_not_padding():
    router = DepthRouter(DIM, DepthConfig(capacity_factor=0.5)).double()
    x, real = torch.randn(2, 8, DIM, dtype=torch.float64), torch.zeros(2, 8, dtype=torch.long)
    half = real.clone()
    half[:, 4:] = -1
    for modality, static, actual in ((real, 8, 8), (half, 8, 4)):
        for routing, expected in (
            (BATCH, static),
            (ACTUAL, actual),
        ):
            selection, _ = router(x, modality, routing)
            assert int(selection.filled_EK.sum()) == expected


def test_names_stand_for_keys():
    named = ModelConfig(groups="mod_moe_2t2i", layers=5)
    groups = [{"modalities": [name], "experts": 2} for name in MODALITIES]
    depth = {"capacity_factor": 0.25, "layers": [0, 2, 4], "scope": "batch"}
    explicit = ModelConfig.model_validate({"groups": groups, "depth": depth, "layers": 5})
    assert named.group_list == explicit.group_list
    assert named.depth_layers == explicit.depth_layers == {0, 2, 4}
    assert named.depth_config is not None and named.depth_config.capacity_factor == 0.25
    assert ModelConfig(groups="mod").group_list == ModelConfig(groups="dense").group_list
    assert (
        ModelConfig(groups="mod").has_expert_choice
        and not ModelConfig(groups="dense").has_expert_choice
    )
    assert ModelConfig(groups="moe_4t4i").depth_config is None


def test_unknown_layers_are_refused():
    with pytest.raises(ValidationError, match="no layer 4 among 4"):
        ModelConfig(layers=4, depth=DepthConfig(layers=(0, 4)))
