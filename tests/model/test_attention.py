"""Attention with projections, norms and rotation, within documents and among selected tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model.attention import Attention
from moma.model.attention_kernels import MaskedAttention, Segments
from moma.model.decoder_layer import TokenContext
from moma.model.layers import rotary_cos_sin
from tests.factories import make_segments
from tests.model.model_reference import attention as slow_attention
from tests.model.model_reference import earlier, numpy


def random_attention(heads: int, kv_heads: int, norm: bool = True, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    module = Attention(8, heads, kv_heads, norm).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def context_of(segments, rotary):
    """The context of tokens without modalities."""
    kernel = MaskedAttention()
    layout = kernel.layout(segments, torch.float64)
    none = torch.empty(0)
    return TokenContext(none, rotary, segments, layout, torch.float64, kernel)


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
    rotary = rotary_cos_sin(positions, 8 // heads[0], 10_000.0)
    segments = make_segments(torch.from_numpy(documents * (not causal)))
    found = module(x, context_of(segments._replace(is_whole=causal), rotary))
    sequence_N = np.arange(sequences * length) // length
    document_N = np.zeros(sequences * length) if causal else documents.flatten()
    expected = slow_attention(
        module,
        numpy(x.flatten(0, 1)),
        positions.flatten().numpy(),
        earlier(sequence_N, document_N, list(range(sequences * length))),
    )
    np.testing.assert_allclose(numpy(found.flatten(0, 1)), expected, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.floats(0.1, 1), st.integers(0, 99))
def test_selected_tokens_attend_within_their_sequence_and_document(sequences, length, part, seed):
    random = np.random.default_rng(seed)
    size = sequences * length
    documents = np.cumsum(random.random((sequences, length)) < 0.3, axis=1)
    token = np.flatnonzero(random.random(size) < part)
    if not len(token):
        return
    module = random_attention(2, 1)
    x = torch.randn(1, len(token), 8, dtype=torch.float64)
    position = token % length
    rotary = rotary_cos_sin(torch.from_numpy(position)[None], 4, 10_000.0)
    segments = make_segments(torch.from_numpy(documents)).select(torch.from_numpy(token)[None])
    found = module(x, context_of(segments, rotary))
    visible = earlier(token // length, documents.flatten()[token], list(range(len(token))))
    expected = slow_attention(module, numpy(x[0]), position, list(visible.values()))
    np.testing.assert_allclose(numpy(found[0]), expected, atol=1e-5)


def test_gradients():
    module = random_attention(2, 1)
    segments = Segments(torch.tensor([[0, 0, 1, 1, 1]]), 2, 5)
    context = context_of(segments, rotary_cos_sin(torch.arange(5)[None], 4, 10_000.0))
    x = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, context), (x,))
