"""Expert groups against a slow loop over Equation 1."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.errors import UserError
from moma.model.experts import DenseGroup, ExpertGroup, MixtureOfExperts
from moma.model.groups import GroupConfig, named_groups
from moma.model.implementations import build_group
from moma.model.layers import SwiGLU
from moma.model.routing import Auxiliary, ExpertChoice, Routing, router_logits, uniform_routing
from moma.vocabulary import IMAGE, MODALITIES, TEXT, ModalityName
from tests.model.model_reference import Group, feed_forward

DIM, HIDDEN = 6, 10
ACTUAL = uniform_routing(ExpertChoice("actual"))


def routed(modality: ModalityName, experts: int, share: float = 0.5, seed: int = 0) -> ExpertGroup:
    torch.manual_seed(seed)
    group = ExpertGroup(DIM, HIDDEN, [MODALITIES.index(modality)], experts, share).double()
    for parameter in group.parameters():
        torch.nn.init.normal_(parameter)
    return group


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([TEXT, IMAGE, -1]), min_size=1, max_size=24),
    st.integers(2, 4),
    st.integers(0, 1000),
)
def test_routed_group_equals_the_equation(modalities, experts, seed):
    group = routed("text", experts, seed=seed)
    x_ND = torch.randn(len(modalities), DIM, dtype=torch.float64)
    y_ND, _ = group(x_ND, group.find_tokens(torch.tensor(modalities), ACTUAL), ACTUAL)
    reference = Group(group, {TEXT}, lambda members: math.ceil(members / experts))
    expected = feed_forward([reference], x_ND.numpy(), modalities)
    np.testing.assert_allclose(y_ND.detach().numpy(), expected, atol=1e-10)


def test_static_capacity_equals_actual_where_the_batch_has_the_shares():
    group = routed("image", 4, share=0.5)
    x_ND = torch.randn(32, DIM, dtype=torch.float64)
    modality_N = torch.tensor([TEXT, IMAGE] * 16)
    static, _ = group(x_ND, group.find_tokens(modality_N, Routing()), Routing())
    actual, _ = group(x_ND, group.find_tokens(modality_N, ACTUAL), ACTUAL)
    torch.testing.assert_close(static, actual, rtol=0, atol=0)


@pytest.mark.parametrize("modalities", [[TEXT] * 8, [-1] * 8, [TEXT] * 7 + [IMAGE]])
def test_absent_modality_leaves_zeros_and_finite_gradients(modalities):
    group = routed("image", 2)
    x_ND = torch.randn(8, DIM, dtype=torch.float64, requires_grad=True)
    y_ND, _ = group(x_ND, group.find_tokens(torch.tensor(modalities), Routing()), Routing())
    y_ND.square().sum().backward()
    others = torch.tensor(modalities) != IMAGE
    assert not y_ND[others].any()
    for parameter in (group.gate, group.router.weight):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    if IMAGE not in modalities:
        assert group.router.weight.grad is not None and not group.router.weight.grad.any()


def test_padding_is_never_selected():
    group = routed("text", 2, share=1.0)
    x_ND = torch.randn(8, DIM, dtype=torch.float64)
    x_ND[4:] *= 100
    without_padding, _ = group(x_ND[:4], group.find_tokens(torch.full((4,), TEXT), ACTUAL), ACTUAL)
    padded, _ = group(x_ND, group.find_tokens(torch.tensor([TEXT] * 4 + [-1] * 4), ACTUAL), ACTUAL)
    torch.testing.assert_close(padded[:4], without_padding)
    assert not padded[4:].any()


def swiglu_of(group: ExpertGroup) -> SwiGLU:
    """Return the first expert of a group as an ordinary feed-forward."""
    swiglu = SwiGLU(DIM, HIDDEN).double()
    with torch.no_grad():
        linear = (swiglu.gate, swiglu.up, swiglu.down)
        for layer, stack in zip(linear, group.matrices(), strict=True):
            layer.weight.copy_(stack[0].T)
    return swiglu


ROUTINGS = [Routing(), ACTUAL, uniform_routing(Auxiliary())]


@pytest.mark.parametrize("modality", [TEXT, IMAGE])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_single_expert_per_modality_equals_a_feed_forward(modality, routing):
    torch.manual_seed(0)
    config = GroupConfig(modalities=(MODALITIES[modality],), experts=1)
    group = build_group(DIM, HIDDEN, config, (0.5, 0.5)).double()
    assert isinstance(group, ExpertGroup)
    for parameter in group.parameters():
        torch.nn.init.normal_(parameter)
    x_ND = torch.randn(10, DIM, dtype=torch.float64)
    modality_N = torch.tensor([IMAGE, TEXT] * 5)
    y_ND, _ = group(x_ND, group.find_tokens(modality_N, routing), routing)
    own_N = modality_N == modality
    torch.testing.assert_close(y_ND[own_N], swiglu_of(group)(x_ND[own_N]))
    assert not y_ND[~own_N].any()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_single_expert_for_all_modalities_equals_a_feed_forward(routing):
    """Both as the module that is built, `DenseGroup`, and as a group of one expert."""
    torch.manual_seed(0)
    stack = ExpertGroup(DIM, HIDDEN, [TEXT, IMAGE], 1, capacity_share=1.0).double()
    for parameter in stack.parameters():
        torch.nn.init.normal_(parameter)
    swiglu = swiglu_of(stack)
    (config,) = named_groups("dense")
    dense = build_group(DIM, HIDDEN, config, (0.5, 0.5)).double()
    assert isinstance(dense, DenseGroup)
    dense.feed_forward.load_state_dict(swiglu.state_dict())
    x_ND = torch.randn(10, DIM, dtype=torch.float64)
    modality_N = torch.tensor([IMAGE, TEXT, TEXT] * 3 + [TEXT])
    for group in (dense, stack):
        y_ND, _ = group(x_ND, group.find_tokens(modality_N, routing), routing)
        torch.testing.assert_close(y_ND, swiglu(x_ND))


def test_causal_routing_follows_only_the_auxiliary_router():
    group = routed("text", 3)
    x_ND = torch.randn(12, DIM, dtype=torch.float64)
    modality_N = torch.tensor([TEXT] * 9 + [IMAGE] * 3)
    routing = uniform_routing(Auxiliary())
    y_ND, _ = group(x_ND, group.find_tokens(modality_N, routing), routing)
    expected = feed_forward([Group(group, {TEXT})], x_ND.numpy(), modality_N.tolist())
    assert expected[:9].any(axis=1).any()
    np.testing.assert_allclose(y_ND.detach().numpy(), expected, atol=1e-9)


def test_a_record_has_the_actual_selection():
    group = routed("text", 2)
    x_ND = torch.randn(8, DIM, dtype=torch.float64)
    modality_N = torch.tensor([TEXT] * 6 + [IMAGE] * 2)
    routing = uniform_routing(ExpertChoice("actual"), record_auxiliary=True)
    _, (diagnostics,) = group(x_ND, group.find_tokens(modality_N, routing), routing)
    record = diagnostics.record
    scores = router_logits(group.router.weight, x_ND).detach()
    for expert in range(2):
        best = scores[:6, expert].topk(3).indices.tolist()
        assert record.selected_NE[:, expert].nonzero().flatten().tolist() == sorted(best)
    assert record.eligible_N.tolist() == [True] * 6 + [False] * 2


def test_outputs_of_overlapping_groups_are_added():
    text, everything = routed("text", 2), routed("text", 3, seed=1)
    everything.modalities = (TEXT, IMAGE)
    x_BSD = torch.randn(2, 4, DIM, dtype=torch.float64)
    modality_BS = torch.tensor([[TEXT, IMAGE] * 2] * 2)
    both, _ = MixtureOfExperts([text, everything])(x_BSD, modality_BS, ACTUAL)
    parts = [
        MixtureOfExperts([group])(x_BSD, modality_BS, ACTUAL)[0] for group in (text, everything)
    ]
    torch.testing.assert_close(both, parts[0] + parts[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dense", [(("text", "image"), 1)]),
        ("moe_8x", [(("text", "image"), 8)]),
        ("moe_7t1i", [(("text",), 7), (("image",), 1)]),
    ],
)
def test_names_of_architectures(name, expected):
    assert [(g.modalities, g.experts) for g in named_groups(name)] == expected


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="moe_4x4"):
        named_groups("moe_4x4")
