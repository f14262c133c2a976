"""Products of experts in float8 equal one product of rounded factors per expert."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moma.model import float8_experts, grouped
from moma.model.dispatch import Dispatch, ScatterSlots, TableSlots
from moma.model.experts import MixtureOfExperts
from moma.model.float8_experts import float8_product, use_float8_experts
from moma.model.grouped import grouped_product
from moma.model.groups import GroupConfig
from moma.model.implementations import ImplementationName, build_experts, build_group
from moma.model.routing import ExpertChoice, Threshold, uniform_routing
from moma.runtime.recompute import recompute
from moma.vocabulary import MODALITIES
from tests.factories import OperationCounter

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DIM, HIDDEN = 32, 48
COUNTS = [[5, 0, 9, 2], [0, 0, 16, 0], [16, 16, 16, 16]]
LARGEST = 448.0
CHOICE = ExpertChoice()
# The implementations that compute in float8; they are those without kernels of our own.
IMPLEMENTATIONS: tuple[ImplementationName, ...] = ("sequential", "batched", "grouped")


def rounded(row: Tensor) -> Tensor:
    """Round one row to float8 (e4m3); the scale is the greatest power of two that fits."""
    scale = 1.0
    largest = max(float(row.abs().max()), 1e-12)
    while largest * scale * 2 <= LARGEST:
        scale *= 2
    while largest * scale > LARGEST:
        scale /= 2
    return (row.float() * scale).to(torch.float8_e4m3fn).double() / scale


def rounded_rows(matrix: Tensor) -> Tensor:
    return torch.stack([rounded(row) for row in matrix]) if len(matrix) else matrix.double()


def slow_product(x: Tensor, stack: Tensor, counts: list[int], grad: Tensor) -> list[Tensor]:
    """Output and gradients in fp64, one product per expert."""
    outputs, grads_x, grads_w = [], [], []
    for own, weight, own_grad in zip(x.split(counts), stack, grad.split(counts), strict=True):
        outputs.append(rounded_rows(own) @ rounded_rows(weight.T).T)
        grads_x.append(rounded_rows(own_grad) @ rounded_rows(weight).T)
        grads_w.append(own.double().T @ own_grad.double())
    return [torch.cat(outputs), torch.cat(grads_x), torch.stack(grads_w)]


def factors(counts: list[int], device: str = "cpu", dtype=torch.float32) -> tuple[Tensor, ...]:
    """Rows of different magnitudes, one of them zero, weights, and an output's gradient."""
    torch.manual_seed(0)
    x = torch.randn(sum(counts), DIM) * torch.logspace(-4, 4, sum(counts))[:, None]
    x[1] = 0
    stack = torch.randn(len(counts), DIM, HIDDEN) * torch.logspace(-2, 2, HIDDEN)
    grad = torch.randn(sum(counts), HIDDEN) * torch.logspace(3, -5, sum(counts))[:, None]
    return tuple(each.to(device, dtype) for each in (x, stack, grad))


def fast_product(
    x: Tensor, stack: Tensor, counts: list[int], grad: Tensor, product: Any
) -> list[Tensor]:
    """The same; equal counts are also given as [E, K, D], of which the result is the same."""
    x, stack = x.clone().requires_grad_(), stack.clone().requires_grad_()
    end = torch.tensor(counts, device=x.device).cumsum(0).int()
    y = product(x, [stack[:1], stack[1:]], end)
    y.backward(grad)
    assert x.grad is not None and stack.grad is not None
    found = [y.detach(), x.grad, stack.grad]
    if len(set(counts)) == 1:
        rows = x.detach().unflatten(0, (len(counts), -1)).requires_grad_()
        again = product(rows, [stack], None)
        grads = torch.autograd.grad(again, [rows, stack], grad.view_as(again))
        for a, b in zip((again, *grads), found, strict=True):
            torch.testing.assert_close(a.reshape(b.shape), b)
    return found


def assert_rows_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Relative to the largest of each row, since products of one row cancel."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).abs() / b.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        assert error.max() <= tolerance


@pytest.mark.parametrize("counts", COUNTS)
def test_emulated_products_are_those_of_rounded_factors(counts):
    x, stack, grad = factors(counts)
    expected = slow_product(x, stack, counts, grad)
    product = partial(float8_product, emulate=True)
    assert_rows_close(fast_product(x, stack, counts, grad, product), expected, 1e-5)
    exact = fast_product(x, stack, counts, grad, grouped_product)
    for rounded_result, exact_result in zip(expected[:2], exact[:2], strict=True):
        assert not torch.allclose(rounded_result.float(), exact_result, rtol=1e-3)


def test_gradients_of_weights_are_one_grouped_product_in_the_dtype_of_compute(monkeypatch):
    """As on a GPU; the first two calls are the emulated products. The gradient has strides 0."""
    counts, calls = COUNTS[0], []
    grouped_mm = functional.grouped_mm

    def counted(*arguments, **options):
        assert all(sorted(each.stride())[0] == 1 for each in arguments)
        calls.append(arguments)
        return grouped_mm(*arguments, **options)

    monkeypatch.setattr(functional, "grouped_mm", counted)
    monkeypatch.setattr(grouped, "uses_kernel", lambda *_: True)
    x, stack, _ = factors(counts)
    grad = torch.ones(()).expand(len(x), HIDDEN)
    expected = slow_product(x, stack, counts, grad)
    product = partial(float8_product, emulate=True)
    assert_rows_close(fast_product(x, stack, counts, grad, product), expected, 1e-5)
    assert len(calls) == 3 and calls[2][0].shape == (DIM, len(x))


@pytest.mark.parametrize("emulate", [False, True])
def test_products_and_gradients_have_the_dtype_of_autocast(emulate, monkeypatch):
    monkeypatch.setattr(functional, "scaled_grouped_mm", kernel)
    product: Any = partial(float8_product, emulate=emulate)
    x, stack, grad = factors(COUNTS[2])
    low = [each.bfloat16() for each in (x, stack, grad)]
    y, *grads = fast_product(low[0], low[1], COUNTS[2], low[2], product)
    with torch.autocast("cpu", torch.bfloat16):
        found = fast_product(x, stack, COUNTS[2], low[2], product)
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, [y, *(each.float() for each in grads)], rtol=0, atol=0)


def kernel(a, b, scale_a, recipe_a, scale_b, recipe_b, offs=None, use_fast_accum=False) -> Tensor:
    """Stands for PyTorch's kernel, whose demands on layouts its meta registration checks."""
    assert recipe_a is recipe_b is functional.ScalingType.RowWise
    meta_a, meta_b, meta_scale_a, meta_scale_b = (
        torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
        for each in (a, b, scale_a, scale_b)
    )
    ends = None if offs is None else offs.to("meta")
    shape = torch._scaled_grouped_mm(meta_a, meta_b, meta_scale_a, meta_scale_b, ends).shape
    factor_a, factor_b = a.double() * scale_a[..., None], b.double() * scale_b[..., None, :]
    if offs is not None:
        rows = factor_a.tensor_split(offs.tolist()[:-1])
        y = torch.cat([own @ matrix for own, matrix in zip(rows, factor_b, strict=True)])
    else:
        y = factor_a @ factor_b
    assert y.shape == shape and use_fast_accum
    return y.bfloat16()


def test_flops_are_those_of_exact_products(monkeypatch):
    monkeypatch.setattr(functional, "scaled_grouped_mm", kernel)
    x, stack, grad = factors(COUNTS[2])
    found = []
    for product in (grouped_product, partial(float8_product, emulate=False)):
        with FlopCounterMode(display=False) as counter:
            fast_product(x, stack, COUNTS[2], grad, product)
        found.append(counter.get_total_flops())
    assert found == [2 * 3 * 2 * len(x) * DIM * HIDDEN] * 2  # as [T, D] and as [E, K, D]


@pytest.mark.parametrize(
    ("counts", "compiled"), [*((counts, False) for counts in COUNTS), (COUNTS[2], True)]
)
def test_the_kernel_gets_what_emulation_computes(counts, compiled, monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return kernel(*arguments, **options)

    monkeypatch.setattr(functional, "scaled_grouped_mm", counted)
    product: Any = partial(float8_product, emulate=False)
    if compiled:
        torch.compiler.reset()
        product = torch.compile(product, fullgraph=True, backend="aot_eager")
    x, stack, grad = factors(counts)
    expected = slow_product(x, stack, counts, grad)
    found = fast_product(x, stack, counts, grad, product)
    assert_rows_close(found, expected, 2**-8)
    assert len(calls) == (4 if len(set(counts)) == 1 else 2)


def test_only_widths_that_the_kernel_supports_are_rounded():
    x, stack, _ = factors([4, 4])
    end = torch.tensor([4, 8], dtype=torch.int32)
    for shape in (stack[..., :40], stack[..., :32]):
        is_exact = torch.equal(
            float8_product(x, [shape], end, emulate=True), grouped_product(x, [shape], end)
        )
        assert is_exact == bool(shape.shape[2] % 16)
    nothing = float8_product(x[:0], [stack], torch.zeros(2, dtype=torch.int32), emulate=False)
    assert nothing.shape == (0, HIDDEN)


def build(
    implementation: ImplementationName, float8: Any, dispatch: Dispatch, device: torch.device = GPU
) -> MixtureOfExperts:
    groups = [
        build_group(
            *(DIM, HIDDEN, GroupConfig(modalities=tuple(names.split()), experts=experts)),
            *((0.5, 0.5), MODALITIES, 0.5),
            dispatch=dispatch,
        )
        for names, experts in (("text", 3), ("image", 1), ("text", 1), ("text image", 1))
    ]
    experts = build_experts(groups, implementation)
    use_float8_experts(experts, float8, device)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def outcome(
    experts: MixtureOfExperts, x: Tensor, modality: Tensor, policy: Any = CHOICE
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, _ = experts(x, modality, uniform_routing(policy))
    y.square().sum().backward()
    grads = [each.grad for each in (x, *experts.parameters())]
    return [y, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize(
    ("dispatch", "policy"),
    [(ScatterSlots, CHOICE), (TableSlots, CHOICE), (ScatterSlots, Threshold())],
)
def test_all_implementations_compute_the_same_in_float8(dispatch, policy):
    x, modality = torch.randn(1, 36, DIM), torch.tensor([[0, 1, 1, -1, 0, 0] * 6])
    exact, first, *others = (
        outcome(build(implementation, float8, dispatch), x, modality, policy)
        for implementation, float8 in (
            ("sequential", "off"),
            *((each, "emulate") for each in IMPLEMENTATIONS),
        )
    )
    for other in others:
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-4)
    for a, b in zip(first, exact, strict=True):
        error = (a - b).norm() / b.norm()
        assert error < 0.15
    assert not torch.allclose(first[0], exact[0], rtol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_selective_recomputation_repeats_no_product_in_float8(implementation, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(functional, "scaled_grouped_mm", kernel)
    counts = []
    for how in ("none", "selective"):
        experts = build(implementation, "on", ScatterSlots)
        recompute(experts, how)
        with OperationCounter() as counter:
            outcome(experts, torch.randn(1, 36, DIM), torch.tensor([[0, 1, 1, -1, 0, 0] * 6]))
        counts.append(counter.counts["moma.float8_product.default"])
    assert counts[0] == counts[1] > 0


def test_no_shape_depends_on_the_data(monkeypatch):
    """On the meta device reading a value is an error, in the forward and the backward pass."""
    # Autocast does not support the meta device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for implementation in IMPLEMENTATIONS:
        experts = build(implementation, "on", TableSlots).to("meta")
        x, modality = torch.empty(1, 32, DIM, device="meta"), torch.empty(1, 32, device="meta")
        with OperationCounter() as counter:
            results = outcome(experts, x, modality)
        assert all(each.is_meta for each in results)
        assert counter.counts["moma.float8_product.default"] >= 6


@pytest.mark.parametrize(
    ("device", "capability", "hip"),
    [(GPU, (10, 0), None), (GPU, (9, 4), "7.0"), (CPU, None, None)],
    ids=["Blackwell", "AMD", "CPU"],
)
def test_other_devices_leave_experts_exact_and_say_so(device, capability, hip, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(float8_experts.logger, "warning", messages.append)
    experts = build("grouped", "on", ScatterSlots, device)
    products = {module.product for module in experts.modules() if hasattr(module, "product")}
    assert products == {grouped_product}
    assert len(messages) == 1 and "compute capability 9.0" in messages[0]


@pytest.mark.gpu
@pytest.mark.parametrize("counts", COUNTS)
def test_the_kernel_equals_emulation_on_a_gpu(counts):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("this GPU has no grouped products in float8")
    x, stack, grad = factors(counts, "cuda", torch.bfloat16)
    expected, found = (
        fast_product(x, stack, counts, grad, partial(float8_product, emulate=emulate))
        for emulate in (True, False)
    )
    assert_rows_close(found, [each.double() for each in expected], 0.02)
