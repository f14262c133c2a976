"""The chunked linear cross-entropy against one that holds all logits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from moma.data.batches.packing import NO_LABEL
from moma.train.cross_entropy import cross_entropy_chunk, linear_cross_entropy


def inputs(
    labels: list[int],
    ids: int = 6,
    width: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(len(labels), width, generator=generator, dtype=dtype)
    weight_VD = torch.randn(ids, width, generator=generator, dtype=dtype)
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_(), torch.tensor(labels)


def reference(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, z_loss: float) -> Tensor:
    total = hidden_ND.new_zeros(())
    for hidden_D, label in zip(hidden_ND, labels_N.tolist(), strict=True):
        if label != NO_LABEL:
            logits_V = weight_VD @ hidden_D
            log_z = logits_V.exp().sum().log()
            total = total + log_z - logits_V[label] + z_loss * log_z**2
    return total


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5) | st.just(NO_LABEL), min_size=1, max_size=12),
    seed=st.integers(0, 99),
    tokens=st.integers(1, 13),
)
def test_objective_and_gradients_equal_the_reference(labels, seed, tokens):
    hidden, weight, targets = inputs(labels, seed=seed)
    objective, _ = linear_cross_entropy(hidden, weight, targets, 0.1, tokens=tokens)
    expected = reference(hidden, weight, targets, 0.1)
    torch.testing.assert_close(objective, expected)
    if (targets != NO_LABEL).any():
        found = torch.autograd.grad(3 * objective, (hidden, weight))
        wanted = torch.autograd.grad(3 * expected, (hidden, weight))
        torch.testing.assert_close(found, wanted)


def test_losses_of_tokens():
    hidden, weight, targets = inputs([0, NO_LABEL, 5, 2, 3])
    _, losses = linear_cross_entropy(hidden, weight, targets, z_loss=0.1, tokens=2)
    logits = (hidden @ weight.T).detach()
    has_label = targets != NO_LABEL
    expected = functional.cross_entropy(logits, targets, reduction="none", ignore_index=NO_LABEL)
    torch.testing.assert_close(losses.loss_N, expected)
    torch.testing.assert_close(losses.log_z_N, logits.logsumexp(1) * has_label)
    np.testing.assert_array_equal(losses.correct_N, (logits.argmax(1) == targets) & has_label)
    assert not losses.loss_N.requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager(backend):
    """Generated code is run behind the marker, and for a layer in `test_compile.py`."""
    hidden, weight, targets = inputs([0, NO_LABEL, 5, 2, 3, 1, 1], dtype=torch.float32)
    results = []
    compiled = torch.compile(cross_entropy_chunk, fullgraph=True, dynamic=False, backend=backend)
    for chunk in (cross_entropy_chunk, compiled):
        objective, losses = linear_cross_entropy(hidden, weight, targets, 0.1, chunk, tokens=3)
        results.append((objective, *losses, *torch.autograd.grad(objective, (hidden, weight))))
    torch.testing.assert_close(*results)


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_only_the_logits_of_one_chunk_exist():
    hidden, weight, targets = inputs([1] * 64, ids=50)
    with _LargestTensor() as largest:
        objective, _ = linear_cross_entropy(hidden, weight, targets, 0.1, tokens=8)
        objective.backward()
    assert largest.elements == 8 * 50


def test_nothing_but_losses_is_computed_without_gradients():
    hidden, weight, targets = inputs([1] * 8, ids=50)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.extend([function] * ("mm" in str(function)))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        linear_cross_entropy(hidden, weight, targets, 0.1, tokens=4)
    assert len(products) == 2  # one product per chunk


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_one_input(frozen):
    hidden, weight, targets = inputs([0, 5, 2])
    parts = {"hidden": hidden, "weight": weight}
    parts[frozen].requires_grad_(False)
    other = parts["weight" if frozen == "hidden" else "hidden"]
    objective, _ = linear_cross_entropy(hidden, weight, targets, 0.1)
    expected = reference(hidden, weight, targets, 0.1)
    torch.testing.assert_close(*(torch.autograd.grad(o, other) for o in (objective, expected)))


def test_autocast_computes_products_in_bf16_and_losses_in_fp32():
    hidden, weight, targets = inputs([0, 5, 2, 4] * 8, ids=64, width=32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        objective, losses = linear_cross_entropy(hidden, weight, targets, 0.0, tokens=8)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    expected = functional.cross_entropy(logits, targets, reduction="none")
    assert losses.loss_N.dtype == objective.dtype == torch.float32
    torch.testing.assert_close(losses.loss_N, expected.detach())
    found = torch.autograd.grad(objective, (hidden, weight))
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_gradients_of_chunks_are_summed_in_fp32():
    """Of 1,000 equal parts, a sum in bf16 would stop to grow."""
    hidden, weight, targets = inputs([1] * 4, dtype=torch.float32)
    gradients = []
    for times in (1, 1000):
        with torch.autocast("cpu", torch.bfloat16):
            objective, _ = linear_cross_entropy(
                hidden.repeat(times, 1), weight, targets.repeat(times), 0.0, tokens=4
            )
        gradients.append(torch.autograd.grad(objective, weight)[0])
    torch.testing.assert_close(gradients[1], 1000 * gradients[0], rtol=1e-4, atol=1e-3)
