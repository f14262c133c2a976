"""Selections, with tied scores, absent modalities and more slots than tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model import routing
from moma.model.routing import (
    any_nonfinite,
    causal_choice,
    expert_choice,
    list_selected,
    router_logits,
    select_all,
    select_by_sequence,
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
@given(logits_and_eligible(), st.booleans())
def test_causal_choice_decides_each_token_by_itself(case, synchronize):
    auxiliary_logits_NE, eligible_N = case
    selected_NE = causal_choice(auxiliary_logits_NE, eligible_N)
    assert torch.equal(selected_NE, (auxiliary_logits_NE > 0) & eligible_N[:, None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "may_synchronize", lambda _: synchronize)
        tokens = list_selected(selected_NE, auxiliary_logits_NE)
    total_NE, start = torch.zeros(selected_NE.shape), 0
    for expert, end in enumerate(tokens.end_E.tolist()):
        total_NE[:, expert].index_add_(0, tokens.index_T[start:end], tokens.score_T[start:end])
        start = end
    assert (
        start == len(tokens.index_T) == (len(selected_NE.flatten()), selected_NE.sum())[synchronize]
    )
    torch.testing.assert_close(total_NE, auxiliary_logits_NE.sigmoid() * selected_NE)


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
        torch.testing.assert_close(selection.score_EK[sequence], expected)


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
