"""Attention within documents, with grouped queries, and among selected tokens."""

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
def test_attention_within_documents_equals_a_slow_reference(starts, heads, norm, causal):
    documents = np.cumsum(starts, axis=1)
    sequences, length = documents.shape
    module = random_attention(heads[0], heads[1], norm)
    x = torch.randn(sequences, length, 8, dtype=torch.float64)
    positions = torch.arange(length).expand(sequences, length)
    angles = rotary_angles(positions, 8 // heads[0], 10_000.0)
    mask = AttentionMask() if causal else AttentionMask(document_mask(torch.from_numpy(documents)))
    found = module(x, angles, mask)
    sequence_N = np.arange(sequences * length) // length
    document_N = np.zeros(sequences * length) if causal else documents.flatten()
    expected = slow_attention(
        module,
        numpy(x.flatten(0, 1)),
        positions.flatten().numpy(),
        earlier(sequence_N, document_N, list(range(sequences * length))),
    )
    np.testing.assert_allclose(numpy(found.flatten(0, 1)), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_gives_identical_results(dtype):
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
def test_selected_tokens_attend_within_their_sequence_and_document(
    sequences, length, part, empty, seed
):
    """Also with windows; a whole sequence may be selected."""
    random = np.random.default_rng(seed)
    size = sequences * length
    documents = np.cumsum(random.random((sequences, length)) < 0.3, axis=1).flatten()
    is_selected = random.random(size) < part
    empty_slots = random.permutation(np.flatnonzero(~is_selected))[:empty]
    token = np.sort(np.concatenate((np.flatnonzero(is_selected), empty_slots))).astype(int)
    if not len(token):
        return
    sequence, position, filled = token // length, token % length, is_selected[token]
    module = random_attention(2, 1)
    x = torch.randn(1, len(token), 8, dtype=torch.float64)
    angles = rotary_angles(torch.from_numpy(position)[None], 4, 10_000.0)
    sequence_1K, document_1K, filled_1K = (
        torch.from_numpy(each)[None] for each in (sequence, documents[token], filled)
    )
    mask = selected_mask(sequence_1K, document_1K, filled_1K, length)
    assert (mask.window is not None) == (len(token) > 2 * length)
    found = numpy(module(x, angles, mask)[0])
    attended = earlier(sequence, documents[token], list(np.flatnonzero(filled)))
    expected = slow_attention(
        module, numpy(x[0]), position, [attended.get(n, [n]) for n in range(len(token))]
    )
    np.testing.assert_allclose(found[filled], expected[filled], atol=1e-5)
    assert np.isfinite(found).all()


def test_windows_do_not_change_the_result():
    """Nor the gradients."""
    length, slots = 4, 18
    token = torch.arange(slots)[None] * 2
    sequence, document = token // length, torch.zeros_like(token)
    filled = torch.rand(1, slots) < 0.8
    windows = selected_mask(sequence, document, filled, length)
    whole = selected_mask(sequence, document, filled, slots)
    assert windows.window == length and whole.window is None
    module = random_attention(2, 2)
    angles = rotary_angles(token % length, 4, 10_000.0)
    x = torch.randn(1, slots, 8, dtype=torch.float64, requires_grad=True)
    outputs = [module(x, angles, mask) for mask in (windows, whole)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("slots", [5, 11])  # without and with windows
def test_gradients(slots):
    module = random_attention(2, 1)
    token = torch.arange(slots)[None]
    filled = torch.arange(slots)[None] % 4 != 3
    mask = selected_mask(token // 4, token // 2, filled, 4)
    angles = rotary_angles(token, 4, 10_000.0)
    x = torch.randn(1, slots, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, angles, mask), (x,))
