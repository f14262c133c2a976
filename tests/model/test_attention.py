"""Attention inside documents, with grouped queries, and among tokens that were picked out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model.attention import (
    Attention,
    AttentionMask,
    additive_mask,
    document_mask,
    selected_mask,
)
from moma.model.layers import rotary_angles
from tests.model.model_reference import attention as slow_attention
from tests.model.model_reference import earlier, numpy


def random_attention(heads: int, kv_heads: int, norm: bool = True, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    module = Attention(8, heads, kv_heads, norm).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


HEADS = st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (4, 1)])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3),
    HEADS,
    st.booleans(),
    st.booleans(),
)
def test_attention_inside_documents_equals_a_slow_reference(starts, heads, norm, whole_row):
    documents = np.cumsum(starts, axis=1)
    rows, length = documents.shape
    module = random_attention(heads[0], heads[1], norm)
    x = torch.randn(rows, length, 8, dtype=torch.float64)
    positions = torch.arange(length).expand(rows, length)
    angles = rotary_angles(positions, 8 // heads[0], 10_000.0)
    mask = (
        AttentionMask() if whole_row else AttentionMask(document_mask(torch.from_numpy(documents)))
    )
    got = module(x, angles, mask)
    row_N = np.arange(rows * length) // length
    document_N = np.zeros(rows * length) if whole_row else documents.flatten()
    expected = slow_attention(
        module,
        numpy(x.flatten(0, 1)),
        positions.flatten().numpy(),
        earlier(row_N, document_N, list(range(rows * length))),
    )
    np.testing.assert_allclose(numpy(got.flatten(0, 1)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_numbers_gives_the_same_bits(dtype):
    module = random_attention(4, 2, True).to(dtype)
    x = torch.randn(2, 9, 8, dtype=dtype, requires_grad=True)
    mask = document_mask(torch.tensor([[0] * 4 + [1] * 5, [0] * 9]))
    angles = rotary_angles(torch.arange(9)[None], 2, 10_000.0)
    results = []
    for each in (mask, additive_mask(mask, dtype)):
        y = module(x, angles, AttentionMask(each))
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.floats(0.1, 1), st.integers(0, 5), st.integers(0, 99)
)
def test_chosen_tokens_see_the_chosen_of_their_row_and_document(rows, length, part, empty, seed):
    """Also where windows are needed: many rows, much chosen; one row may be chosen whole."""
    random = np.random.default_rng(seed)
    size = rows * length
    documents = np.cumsum(random.random((rows, length)) < 0.3, axis=1).flatten()
    taken_of = random.random(size) < part
    slots = np.sort(random.permutation(np.flatnonzero(~taken_of))[:empty])
    token = np.sort(np.concatenate((np.flatnonzero(taken_of), slots))).astype(int)
    if not len(token):
        return
    row, taken = token // length, taken_of[token]
    module = random_attention(2, 1)
    x = torch.randn(1, len(token), 8, dtype=torch.float64)
    position = token % length
    angles = rotary_angles(torch.from_numpy(position)[None], 4, 10_000.0)
    row_1K, document_1K, taken_1K = (
        torch.from_numpy(each)[None] for each in (row, documents[token], taken)
    )
    mask = selected_mask(row_1K, document_1K, taken_1K, length)
    assert (mask.window is not None) == (len(token) > 2 * length)
    got = numpy(module(x, angles, mask)[0])
    real = list(np.flatnonzero(taken))
    seen = earlier(row, documents[token], real)
    expected = slow_attention(
        module, numpy(x[0]), position, [seen.get(n, [n]) for n in range(len(token))]
    )
    np.testing.assert_allclose(got[taken], expected[taken], atol=1e-5)
    assert np.isfinite(got).all()


def test_windows_hold_all_that_one_long_sequence_shows():
    """The same slots with and without windows, and gradients through both."""
    length, slots = 4, 18
    token = torch.arange(slots)[None] * 2
    row, document = token // length, torch.zeros_like(token)
    taken = torch.rand(1, slots) < 0.8
    folded = selected_mask(row, document, taken, length)
    whole = selected_mask(row, document, taken, slots)
    assert folded.window == length and whole.window is None
    module = random_attention(2, 2)
    angles = rotary_angles(token % length, 4, 10_000.0)
    x = torch.randn(1, slots, 8, dtype=torch.float64, requires_grad=True)
    outputs = [module(x, angles, mask) for mask in (folded, whole)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("slots", [5, 11])  # in one piece, and in windows
def test_gradients(slots):
    module = random_attention(2, 1)
    token = torch.arange(slots)[None]
    taken = torch.arange(slots)[None] % 4 != 3
    mask = selected_mask(token // 4, token // 2, taken, 4)
    angles = rotary_angles(token, 4, 10_000.0)
    x = torch.randn(1, slots, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, angles, mask), (x,))
