"""Selections, with tied scores, absent modalities and more slots than tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model import routing
from moma.model.routers import select_slots
from moma.model.routing import (
    Auxiliary,
    ExpertChoice,
    Noisy,
    PolicyInputs,
    Threshold,
    any_nonfinite,
    cutoffs_of,
    router_logits,
    select_all,
    select_by_sequence,
    select_ragged,
    select_top_k,
    selected_by,
    static_capacity,
)


def test_slots_are_rounded_up_but_not_for_an_inexact_product():
    assert [static_capacity(0.25, tokens) for tokens in (8, 9, 10)] == [2, 3, 3]
    assert 0.07 * 100 > 7 and static_capacity(0.07, 100) == 7
    assert static_capacity(0.5, 10, 2) == 3


@st.composite
def logits_and_eligible(draw):
    tokens, experts = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    # Few values, so that ties are common.
    values = draw(
        st.lists(st.integers(-3, 3), min_size=tokens * experts, max_size=tokens * experts)
    )
    eligible = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return torch.tensor(values).float().view(tokens, experts), torch.tensor(eligible)


def policy_inputs(logits_NE, eligible_N, num_slots: int = 1) -> PolicyInputs:
    """Main and auxiliary logits that are equal, with threshold 0."""
    experts = logits_NE.shape[1]
    eligible_EN = eligible_N.expand(experts, -1)
    threshold_E1 = torch.zeros(experts, 1)
    return PolicyInputs(logits_NE.T, eligible_EN, logits_NE.T, threshold_E1, lambda mode: num_slots)


@settings(max_examples=200, deadline=None)
@given(logits_and_eligible(), st.integers(1, 25))
def test_expert_choice_selects_the_highest_scored_eligible_tokens(case, capacity):
    logits_NE, eligible_N = case
    eligible_EN = eligible_N.expand(logits_NE.shape[1], -1)
    selection = select_top_k(logits_NE.T, eligible_EN, capacity)
    selected_NE = selection.selected_NE(len(logits_NE)).bool()
    count = min(capacity, int(eligible_N.sum()))
    for expert in range(logits_NE.shape[1]):
        selected_N = selected_NE[:, expert]
        assert int(selected_N.sum()) == count
        assert not (selected_N & ~eligible_N).any()
        others = logits_NE[eligible_N & ~selected_N, expert]
        if count and len(others):
            assert logits_NE[selected_N, expert].min() >= others.max()
    expected = logits_NE.T.gather(1, selection.index_EK).sigmoid()
    assert torch.equal(selection.weight_EK[selection.filled_EK], expected[selection.filled_EK])
    assert not selection.weight_EK[~selection.filled_EK].any()


@settings(max_examples=200, deadline=None)
@given(logits_and_eligible(), st.booleans())
def test_auxiliary_routers_decide_each_token_by_itself(case, synchronize):
    auxiliary_logits_NE, eligible_N = case
    selected_NE = Auxiliary().candidates(policy_inputs(auxiliary_logits_NE, eligible_N)).T
    assert torch.equal(selected_NE, (auxiliary_logits_NE > 0) & eligible_N[:, None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "may_synchronize", lambda _: synchronize)
        tokens = select_ragged(selected_NE.T, auxiliary_logits_NE.T)
    total_NE, start = torch.zeros(selected_NE.shape), 0
    for expert, end in enumerate(tokens.end_E.tolist()):
        total_NE[:, expert].index_add_(0, tokens.index_T[start:end], tokens.weight_T[start:end])
        start = end
    assert (
        start == len(tokens.index_T) == (len(selected_NE.flatten()), selected_NE.sum())[synchronize]
    )
    torch.testing.assert_close(total_NE, auxiliary_logits_NE.sigmoid() * selected_NE)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 3), st.integers(1, 14), st.data())
def test_a_threshold_between_the_cuts_selects_what_expert_choice_selected(
    seed, tokens, experts, capacity, data
):
    logits_NE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    eligible = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    inputs = policy_inputs(logits_NE, torch.tensor(eligible), capacity)
    selection = select_top_k(inputs.logits_RN, inputs.eligible_RN, capacity)
    cutoff_E = cutoffs_of(inputs.logits_RN, inputs.eligible_RN, selection.index_EK)
    for row, cut in enumerate(cutoff_E.tolist()):
        own = sorted(logits_NE[inputs.eligible_RN[0], row].tolist(), reverse=True)
        expected = (own[capacity - 1] + own[capacity]) / 2 if len(own) > capacity else -math.inf
        assert cut == pytest.approx(expected)
    exceeding = inputs._replace(threshold_R1=cutoff_E[:, None])
    selected_RN = selected_by(ExpertChoice(), inputs)
    assert torch.equal(selected_by(Threshold(), exceeding), selected_RN)
    assert torch.equal(selected_by(Threshold("static"), exceeding), selected_RN)


def test_thresholds_with_a_capacity_drop_the_lowest_scores():
    logits_NE = torch.tensor([[3.0], [1.0], [5.0], [2.0], [-1.0]])
    inputs = policy_inputs(logits_NE, torch.ones(5, dtype=torch.bool), 2)
    inputs = inputs._replace(threshold_R1=torch.zeros(1, 1))
    selection, cutoff_1, excess = select_slots(Threshold("static"), inputs)
    assert set(selection.index_EK[0].tolist()) == {0, 2} and int(excess or 0) == 2
    assert cutoff_1.tolist() == [2.5]
    few = inputs._replace(threshold_R1=torch.full((1, 1), 4.0))
    selection, cutoff_1, excess = select_slots(Threshold("static"), few)
    assert selection.filled_EK.sum() == 1 and excess is not None and int(excess) == 0
    assert cutoff_1.tolist() == [2.5]


@pytest.mark.parametrize("rate", [0.0, 0.05, 1.0])
def test_noisy_decisions_are_inverted_at_their_rate(rate):
    torch.manual_seed(0)
    inputs = policy_inputs(torch.randn(20_000, 2), torch.arange(20_000) % 4 > 0, 3000)
    for policy in (ExpertChoice(), Threshold()):
        selected_RN = selected_by(policy, inputs)
        inverted_RN = selected_RN ^ selected_by(Noisy(policy, rate), inputs)
        assert not inverted_RN[~inputs.eligible_RN].any()
        found = inverted_RN[inputs.eligible_RN].float().mean()
        assert float(found) == pytest.approx(rate, abs=0.005)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.booleans()
)
def test_selected_tokens_keep_their_order_within_each_sequence(rows, synchronize):
    selected_BS = torch.tensor(rows)
    logits_BS = torch.randn(selected_BS.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "may_synchronize", lambda _: synchronize)
        selection = select_by_sequence(selected_BS, logits_BS)
    longest = max(map(sum, rows))
    assert selection.index_EK.shape == (len(rows), longest if synchronize else 5)
    for sequence, row in enumerate(rows):
        filled = selection.filled_EK[sequence]
        index = selection.index_EK[sequence]
        assert (index[filled] - 5 * sequence).tolist() == [n for n, each in enumerate(row) if each]
        assert filled.tolist() == [True] * sum(row) + [False] * (len(filled) - sum(row))
        assert (index.diff() >= 0).all()
        expected = logits_BS.flatten()[index].sigmoid() * filled
        torch.testing.assert_close(selection.weight_EK[sequence], expected)


@settings(max_examples=50, deadline=None)
@given(logits_and_eligible(), st.integers(1, 25))
def test_a_single_expert_selects_all_tokens_with_weight_one(case, capacity):
    _, eligible_N = case
    selection = select_all(eligible_N, capacity)
    expected = eligible_N.nonzero().flatten().tolist()[:capacity]
    filled = selection.filled_EK[0]
    assert selection.index_EK[0][filled].tolist() == expected
    assert selection.weight_EK[0].tolist() == filled.float().tolist()


def test_logits_of_few_and_of_many_experts_are_equal(monkeypatch):
    x_ND = torch.randn(6, 8, dtype=torch.double, requires_grad=True)
    weight_ED = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    expected = x_ND.detach().numpy() @ weight_ED.detach().numpy().T
    for few in (0, 3):
        monkeypatch.setattr(routing, "FEW_EXPERTS", few)
        assert router_logits(weight_ED, x_ND).detach().numpy() == pytest.approx(expected)
        assert torch.autograd.gradcheck(router_logits, (weight_ED, x_ND))


@settings(max_examples=100, deadline=None)
@given(logits_and_eligible(), st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_a_nonfinite_logit_counts_only_for_eligible_tokens(case, value, data):
    logits_NE, eligible_N = case
    assert not any_nonfinite(logits_NE, eligible_N)
    n, expert = (data.draw(st.integers(0, size - 1)) for size in logits_NE.shape)
    logits_NE[n, expert] = value
    assert bool(any_nonfinite(logits_NE, eligible_N)) == bool(eligible_N[n])
