"""Selections, with tied scores, absent modalities and more slots than tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model import routing
from moma.model.routing import (
    any_nonfinite,
    causal_routing,
    expert_choice,
    router_logits,
    select_all,
)


@st.composite
def logits_and_eligible(draw):
    tokens, experts = draw(st.integers(1, 20)), draw(st.integers(1, 4))
    # Few values, so that ties are common.
    values = draw(
        st.lists(st.integers(-3, 3), min_size=tokens * experts, max_size=tokens * experts)
    )
    eligible = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    return torch.tensor(values).float().view(tokens, experts), torch.tensor(eligible)


@settings(max_examples=200, deadline=None)
@given(logits_and_eligible(), st.integers(1, 25))
def test_expert_choice_selects_the_highest_scored_eligible_tokens(case, capacity):
    logits_NE, eligible_N = case
    selection = expert_choice(logits_NE, eligible_N, capacity)
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
    assert torch.equal(selection.score_EK[selection.filled_EK], expected[selection.filled_EK])
    assert not selection.score_EK[~selection.filled_EK].any()


@settings(max_examples=200, deadline=None)
@given(logits_and_eligible())
def test_causal_routing_decides_each_token_by_itself(case):
    auxiliary_logits_NE, eligible_N = case
    selection = causal_routing(auxiliary_logits_NE * 0.5, auxiliary_logits_NE, eligible_N)
    expected = (auxiliary_logits_NE > 0) & eligible_N[:, None]
    assert torch.equal(selection.selected_NE(len(auxiliary_logits_NE)).bool(), expected)
    order = torch.randperm(len(auxiliary_logits_NE))
    shuffled_NE = auxiliary_logits_NE[order]
    again = causal_routing(shuffled_NE, shuffled_NE, eligible_N[order])
    assert torch.equal(again.selected_NE(len(order)).bool(), expected[order])


@settings(max_examples=50, deadline=None)
@given(logits_and_eligible(), st.integers(1, 25))
def test_a_single_expert_selects_all_tokens_with_score_one(case, capacity):
    _, eligible_N = case
    selection = select_all(eligible_N, capacity)
    expected = eligible_N.nonzero().flatten().tolist()[:capacity]
    filled = selection.filled_EK[0]
    assert selection.index_EK[0][filled].tolist() == expected
    assert selection.score_EK[0].tolist() == filled.float().tolist()


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
def test_a_nonfinite_score_counts_only_for_eligible_tokens(case, value, data):
    logits_NE, eligible_N = case
    assert not any_nonfinite(logits_NE, eligible_N)
    n, expert = (data.draw(st.integers(0, size - 1)) for size in logits_NE.shape)
    logits_NE[n, expert] = value
    assert bool(any_nonfinite(logits_NE, eligible_N)) == bool(eligible_N[n])
