"""The attention kernels against a slow reference, forward and backward.

Flash attention has no CPU kernel; the operator that `varlen_attn` calls gets a slow one here, so
that its arguments and its gradients are those of a GPU.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.overrides import TorchFunctionMode

from moma.model.attention_kernels import (
    AttentionKernel,
    MaskedAttention,
    Segments,
    attention_kernel,
    number_segments,
)
from moma.model.gpu_attention import FlexAttention, VarlenAttention
from moma.runtime.recompute import Recompute, recompute
from tests.factories import OperationCounter


def slow_attention(query: Tensor, key: Tensor, value: Tensor, segment_RS: Tensor) -> Tensor:
    """Attend token by token and head by head, [R, S, H, C]."""
    sequences, length, heads, width = query.shape
    per_key_head = heads // key.shape[2]
    rows = []
    for r in range(sequences):
        for s in range(length):
            earlier = [t for t in range(s + 1) if segment_RS[r, t] == segment_RS[r, s]]
            for h in range(heads):
                keys, values = (
                    key[r, earlier, h // per_key_head],
                    value[r, earlier, h // per_key_head],
                )
                weights = (keys @ query[r, s, h] * width**-0.5).softmax(0)
                rows.append(weights @ values)
    return torch.stack(rows).view_as(query)


def probabilities(query: Tensor, key: Tensor, ends: Tensor, is_causal: bool) -> Tensor:
    """Attention weights of flattened segments, [H, N, N]."""
    assert is_causal and ends.dtype == torch.int32 and int(ends[-1]) == len(query)
    segment_N = torch.arange(len(ends) - 1).repeat_interleave(ends.diff())
    attends_NN = (segment_N[:, None] == segment_N).tril()
    logits_HNN = torch.einsum("qhc,khc->hqk", query, key) * query.shape[-1] ** -0.5
    return logits_HNN.masked_fill(~attends_NN, -torch.inf).softmax(-1)


@varlen._varlen_attn.register_kernel("cpu")
def flash_forward(query, key, value, ends, ends_k, longest, longest_k, is_causal=False, *rest: Any):
    assert torch.equal(ends, ends_k) and int(ends.diff().max()) <= longest == longest_k
    y_NHC = torch.einsum("hqk,khc->qhc", probabilities(query, key, ends, is_causal), value)
    return y_NHC, query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def flash_backward(
    grad, query, key, value, out, lse, ends, ends_k, longest, longest_k, is_causal, *rest: Any
):
    weight_HNN = probabilities(query, key, ends, is_causal)
    grad_weight_HNN = torch.einsum("qhc,khc->hqk", grad, value)
    mean_HN1 = (weight_HNN * grad_weight_HNN).sum(-1, keepdim=True)
    grad_logits_HNN = weight_HNN * (grad_weight_HNN - mean_HN1) * query.shape[-1] ** -0.5
    return (
        torch.einsum("hqk,khc->qhc", grad_logits_HNN, key),
        torch.einsum("hqk,qhc->khc", grad_logits_HNN, query),
        torch.einsum("hqk,qhc->khc", weight_HNN, grad),
    )


@st.composite
def packed(draw):
    """Segments of packed sequences, with heads of queries and of keys."""
    sequences, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    size = sequences * length
    documents = np.cumsum(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    documents_RS = torch.from_numpy(documents.reshape(sequences, length))
    padding = draw(st.integers(0, length - 1))
    is_padding_RS = torch.zeros(sequences, length, dtype=torch.bool)
    is_padding_RS[-1, length - padding :] = True
    id_RS = number_segments(documents_RS, is_padding_RS)
    spare = draw(st.integers(0, 3))
    segments = Segments(id_RS, int(id_RS.max()) + 1 + spare, length)
    return segments, draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (2, 1)]))


def inputs(
    shape: torch.Size, heads: tuple[int, int], width: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(*shape, number, width, dtype=torch.float64, requires_grad=True)
        for number in (heads[0], heads[1], heads[1])
    )
    return query, key, value


def assert_equals_the_reference(kernel: AttentionKernel, segments: Segments, heads) -> None:
    parts = inputs(segments.id_RS.shape, heads)
    found = kernel(*parts, kernel.layout(segments, torch.float64))
    expected = slow_attention(*parts, segments.id_RS)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    gradients = (torch.autograd.grad((y * weights).sum(), parts) for y in (found, expected))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kernel", [MaskedAttention(), VarlenAttention()])
@settings(max_examples=30, deadline=None)
@given(case=packed())
def test_kernels_equal_the_reference(kernel, case):
    assert_equals_the_reference(kernel, *case)


@pytest.mark.parametrize("queries", [1, 2, 3, 7])
def test_blocks_of_queries_read_the_keys_up_to_their_end(queries):
    segments = Segments(torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 4, 4, 4]]), 5, 7)
    with _AttentionCalls() as recorded:
        assert_equals_the_reference(MaskedAttention(queries), segments, (4, 2))
    ends = [*range(queries, 7, queries), 7]
    assert [key[2] for _, key, _ in recorded.calls] == ends
    assert sum(query[2] for query, _, _ in recorded.calls) == 7


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("kernel", [MaskedAttention(), VarlenAttention()])
def test_whole_sequences(kernel, heads):
    id_RS = torch.arange(3)[:, None].expand(3, 5)
    assert_equals_the_reference(kernel, Segments(id_RS, 3, 5, is_whole=True), heads)


def test_flex_attention_equals_the_reference():
    """On a CPU only the forward pass exists, and a head is at least 16 wide."""
    id_RS = torch.tensor([[0, 0, 0, 1, 1, 2], [3, 4, 4, 4, 4, 4]])
    query, key, value = (x.detach().float() for x in inputs(id_RS.shape, (4, 2), width=16))
    kernel = FlexAttention()
    with torch.no_grad():
        found = kernel(query, key, value, kernel.layout(Segments(id_RS, 5, 6), torch.float32))
    torch.testing.assert_close(found, slow_attention(query, key, value, id_RS))


@settings(max_examples=30, deadline=None)
@given(case=packed(), seed=st.integers(0, 99))
def test_selected_tokens_are_packed_sequences(case, seed):
    """Every kernel sees, among selected tokens, the selected ones of the same segment."""
    segments, heads = case
    tokens = segments.id_RS.numel()
    random = np.random.default_rng(seed)
    index_1K = np.sort(random.permutation(tokens)[: random.integers(1, tokens + 1)])[None]
    selected = segments.select(torch.from_numpy(index_1K))
    assert selected.id_RS.tolist() == [segments.id_RS.flatten()[index_1K[0]].tolist()]
    for kernel in (MaskedAttention(), VarlenAttention()):
        assert_equals_the_reference(kernel, selected, heads)


def test_segments_are_runs_of_a_document_or_of_padding():
    documents = torch.tensor([[0, 0, 1, 1], [1, 1, -1, -1], [0, 0, 0, 0]])
    padding = torch.tensor([[False] * 4, [False, False, True, True], [False, False, True, True]])
    expected = [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]]
    assert number_segments(documents, padding).tolist() == expected


def test_layouts_have_static_shapes():
    """The number of segments changes no shape, so that no step is compiled again."""
    kernel = VarlenAttention()
    shapes = set()
    for starts in ([0, 0, 0, 0], [0, 1, 1, 2]):
        layout = kernel.layout(Segments(torch.tensor([starts]), 6, 4), torch.bfloat16)
        shapes.add((layout.ends_M1.shape, layout.max_length))
    assert shapes == {((7,), 4)}


def test_varlen_attention_compiles_to_one_graph_on_fake_tensors():
    segments = Segments(torch.tensor([[0, 0, 1, 1, 1, 2]]), 8, 6)

    def attend(query, key, value, id_RS):
        kernel = VarlenAttention()
        return kernel(query, key, value, kernel.layout(segments._replace(id_RS=id_RS), query.dtype))

    parts = inputs(segments.id_RS.shape, (2, 1))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [function(*parts, segments.id_RS) for function in (attend, compiled)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), parts) for y in results))


class _AttentionCalls(TorchFunctionMode):
    """Records the shapes of queries and keys, and the options, of attention."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[torch.Size, torch.Size, dict[str, Any]]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.scaled_dot_product_attention:
            self.calls.append((args[0].shape, args[1].shape, kwargs))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_whole", [False, True])
def test_grouped_queries_with_a_mask_use_no_kernel_that_stores_all_products(is_whole):
    """On a GPU only the math kernel takes a mask and fewer key heads than query heads."""
    segments = Segments(torch.tensor([[0, 0, 1, 1, 1, 2]]), 8, 6, is_whole)
    query, key, value = (x.detach().float() for x in inputs(segments.id_RS.shape, (4, 2), width=16))
    kernel = MaskedAttention()
    with _AttentionCalls() as recorded, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        kernel(query, key, value, kernel.layout(segments, torch.float32))
    ((query_shape, key_shape, options),) = recorded.calls
    is_grouped = query_shape[1] != key_shape[1] or options["enable_gqa"]
    assert is_grouped == is_whole == (options["attn_mask"] is None)


def test_a_mask_of_another_dtype_is_refused():
    segments = Segments(torch.tensor([[0, 0, 1]]), 2, 3)
    kernel = MaskedAttention()
    with pytest.raises(TypeError, match="bfloat16"):
        kernel(*inputs(segments.id_RS.shape, (2, 1)), kernel.layout(segments, torch.bfloat16))


@pytest.mark.parametrize(
    ("device", "dtype", "width", "expected"),
    [
        ("cpu", torch.bfloat16, 64, MaskedAttention),
        ("cuda", torch.bfloat16, 64, VarlenAttention),
        ("cuda", torch.float32, 64, FlexAttention),
        ("cuda", torch.bfloat16, 60, FlexAttention),
        ("cuda", torch.bfloat16, 512, FlexAttention),
        ("cuda", torch.bfloat16, 8, VarlenAttention),
        ("cuda", torch.float32, 8, MaskedAttention),
    ],
)
def test_the_kernel_fits_device_dtype_and_width(device, dtype, width, expected):
    assert type(attention_kernel(torch.device(device), dtype, width)) is expected


@pytest.mark.parametrize(("width", "expected"), [(64, FlexAttention), (8, MaskedAttention)])
def test_a_deterministic_kernel_is_not_flash_attention(width, expected):
    kernel = attention_kernel(torch.device("cuda"), torch.bfloat16, width, deterministic=True)
    assert type(kernel) is expected


def test_selective_recomputation_keeps_the_outputs_of_flash_attention():
    kernel = VarlenAttention()
    layout = kernel.layout(Segments(torch.zeros(1, 6, dtype=torch.long), 1, 6), torch.float64)

    class Attend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kernel(x, x, x, layout).sin()

    cases: tuple[tuple[Recompute, int], ...] = (("layer", 2), ("selective", 1))
    for how, expected in cases:
        module = Attend()
        recompute(module, how)
        x = torch.randn(1, 6, 2, 8, dtype=torch.float64, requires_grad=True)
        with OperationCounter() as counting:
            module(x).sum().backward()
        assert counting.counts["torch_attn._varlen_attn.default"] == expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kernel", "dtype", "near"),
    [(VarlenAttention(), torch.bfloat16, 3e-2), (FlexAttention(), torch.float32, 2e-3)],
)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_kernels_of_a_gpu_equal_masked_attention(kernel, dtype, near, key_heads):
    """Forward and backward, with empty segments beyond the last one."""
    id_RS = torch.arange(2 * 256).div(37, rounding_mode="floor").view(2, 256).cuda()
    segments = Segments(id_RS, 64, 256)
    found = []
    for each in (kernel, MaskedAttention()):
        generator = torch.Generator().manual_seed(0)
        heads = (4, key_heads, key_heads)
        given = [
            torch.randn(2, 256, h, 64, generator=generator).to("cuda", dtype).requires_grad_()
            for h in heads
        ]
        query, key, value = given
        output = each(query, key, value, each.layout(segments, dtype))
        output.square().sum().backward()
        found.append([output, *(x.grad for x in given)])
    torch.testing.assert_close(*found, rtol=near, atol=near)
