"""Products of rows that are sorted by expert."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model import grouped
from moma.model.grouped import grouped_product


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 99))
def test_grouped_product_equals_one_product_per_expert(counts, split, seed):
    torch.manual_seed(seed)
    x = torch.randn(sum(counts), 3, dtype=torch.float64)
    stack = torch.randn(len(counts), 3, 5, dtype=torch.float64)
    weights = [part for part in stack.split(split)]
    end = torch.tensor(counts).cumsum(0).int()
    parts = [own @ stack[e] for e, own in enumerate(x.split(counts))]
    torch.testing.assert_close(grouped_product(x, weights, end), torch.cat(parts))


def test_gradients_of_the_grouped_product():
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(e, 3, 2, dtype=torch.float64, requires_grad=True) for e in (1, 2))
    end = torch.tensor([2, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, a, b: grouped_product(x, [a, b], end), (x, a, b))
    # Frozen weights, as while auxiliary routers train.
    (grad,) = torch.autograd.grad(grouped_product(x, [a.detach(), b.detach()], end).sum(), x)
    assert grad.shape == x.shape


def product_and_gradients(x, weights, end) -> list[torch.Tensor]:
    inputs = [each.detach().clone().requires_grad_() for each in (x, *weights)]
    y = grouped_product(inputs[0], inputs[1:], end)
    return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]


def expert_by_expert(x, weights, end) -> list[torch.Tensor]:
    """The same in float64, one product per expert."""
    inputs = [each.detach().double().requires_grad_() for each in (x, *weights)]
    matrices = [matrix for stack in inputs[1:] for matrix in stack]
    starts = [0, *end.tolist()[:-1]]
    parts = [
        inputs[0][start:stop] @ matrix
        for start, stop, matrix in zip(starts, end.tolist(), matrices, strict=True)
    ]
    y = torch.cat(parts)
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


COUNTS = [[5, 0, 9, 2], [0, 0, 16, 0], [0, 7, 0, 0], [1, 2, 3, 4]]


def product_inputs(counts, device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 16, device=device, dtype=dtype)
    weights = [torch.randn(e, 16, 24, device=device, dtype=dtype) for e in (3, 1)]
    return x, weights, torch.tensor(counts, device=device).cumsum(0).int()


@pytest.mark.parametrize("counts", COUNTS)
def test_the_kernel_equals_one_product_per_expert(counts, monkeypatch):
    """As on a GPU; some experts have no tokens."""
    calls = []
    kernel = torch.nn.functional.grouped_mm

    def counted(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    monkeypatch.setattr(grouped, "uses_kernel", lambda *_: True)
    case = product_inputs(counts)
    found, expected = product_and_gradients(*case), expert_by_expert(*case)
    assert len(calls) == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-5)


def test_the_kernel_reads_one_stack_of_weights_where_it_is(monkeypatch):
    """Under causal routing a copy would cost as much as the product."""
    x, weights, end = product_inputs([4, 8, 4])
    read = []
    monkeypatch.setattr(grouped, "uses_kernel", lambda *_: True)
    monkeypatch.setattr(
        torch.nn.functional, "grouped_mm", lambda _, weight, offs: read.append(weight)
    )
    grouped_product(x, weights[:1], end)
    assert read[0].data_ptr() == weights[0].data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNTS)
def test_the_kernel_equals_one_product_per_expert_in_bf16(counts):
    aligned = [grouped.row_alignment(torch.device("cuda")) * count for count in counts]
    case = product_inputs(aligned, "cuda", torch.bfloat16)
    assert grouped.uses_kernel(case[0], case[1][0])
    for found, expected in zip(product_and_gradients(*case), expert_by_expert(*case), strict=True):
        error = (found.double() - expected).abs().max()
        assert error <= 0.02 * expected.abs().max()
