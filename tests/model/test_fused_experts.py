"""Experts by Triton kernels, interpreted on a CPU or compiled on a GPU, against Equation 1."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from moma.errors import UserError
from moma.model import fused_experts
from moma.model.architecture import ModelConfig
from moma.model.dispatch import ScatterSlots, TableSlots
from moma.model.experts import RoutedExperts
from moma.model.fused_experts import add_fused_outputs
from moma.model.routing import Routing, Selection
from moma.model.transformer import Transformer
from moma.runtime.recompute import recompute
from tests.factories import OperationCounter, make_vocabulary

is_interpreted = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(
            not is_interpreted, reason="needs Triton (`pip install triton`) and TRITON_INTERPRET=1"
        ),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# Tokens, widths D and F, slots, and the filled slots of each expert.
SMALL = (9, 20, 24, 6, [[0, 1, 2, 3, 4, 5], [], [1, 3]])
# More than one tile in each direction, none of which is full.
LARGE = (150, 136, 264, 140, [range(140), range(3), range(129), []])


@pytest.fixture
def kernels_everywhere(monkeypatch):
    monkeypatch.setattr(fused_experts, "uses_kernels", lambda x_ND: x_ND.dtype != torch.float64)


def inputs_of(case, device="cpu", dtype=torch.float32) -> tuple[list[torch.Tensor], Selection]:
    """Tokens and weights [gate, up, down], and random slots: no token twice in an expert."""
    tokens, dim, hidden, slots, filled = case
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    experts = len(filled)
    weights = draw(experts, dim, hidden), draw(experts, dim, hidden), draw(experts, hidden, dim)
    index_EK = [torch.randperm(tokens, generator=generator)[:slots] for _ in range(experts)]
    filled_EK = torch.zeros(experts, slots, dtype=torch.bool)
    for row_K, numbers in zip(filled_EK, filled, strict=True):
        row_K[list(numbers)] = True
    weight_EK = torch.rand(experts, slots, generator=generator) * filled_EK
    chosen = Selection(torch.stack(index_EK), filled_EK, weight_EK)
    inputs = [draw(tokens, dim), *(weight * weight.shape[1] ** -0.5 for weight in weights)]
    return inputs, Selection(*(part.to(device) for part in chosen))


def equation_1(
    inputs: Sequence[torch.Tensor], selection: Selection, total_ND: torch.Tensor
) -> torch.Tensor:
    """Token after token, in fp64."""
    x_ND, gate_EDF, up_EDF, down_EFD = inputs
    sums = list(total_ND.double().unbind())
    for expert, slot in selection.filled_EK.nonzero().tolist():
        token = int(selection.index_EK[expert, slot])
        gate_F, up_F = x_ND[token] @ gate_EDF[expert], x_ND[token] @ up_EDF[expert]
        ffn_D = (torch.nn.functional.silu(gate_F) * up_F) @ down_EFD[expert]
        sums[token] = sums[token] + selection.weight_EK[expert, slot] * ffn_D
    return torch.stack(sums)


def outcome(compute, inputs, selection, dtype) -> list[torch.Tensor]:
    """Outputs and gradients of all inputs and of the weights."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
    weight_EK = selection.weight_EK.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    total_ND = torch.ones_like(leaves[0], dtype=weight_EK.dtype)
    y_ND = compute(leaves, selection._replace(weight_EK=weight_EK), total_ND)
    gradient_ND = torch.linspace(-1, 1, y_ND.numel(), device=y_ND.device).view_as(y_ND)
    grads = torch.autograd.grad(y_ND, [*leaves, weight_EK], gradient_ND.to(y_ND.dtype))
    # Those of empty slots are multiplied by 0 where weights are computed.
    return [y_ND.detach(), *grads[:-1], grads[-1] * selection.filled_EK]


def experts_of(inputs: Sequence[torch.Tensor], selection: Selection) -> RoutedExperts:
    return RoutedExperts(inputs[1], inputs[2], inputs[3], selection)


def fused(leaves, selection, total_ND):
    return add_fused_outputs(total_ND, leaves[0], experts_of(leaves, selection), TableSlots)


@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
@pytest.mark.parametrize("case", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=len)
def test_the_kernels_compute_equation_1(case, dtype, tolerance, device):
    """Unequal numbers of tokens, an expert without any, an empty slot before a filled one."""
    inputs, selection = inputs_of(case, device, dtype)
    found = outcome(fused, inputs, selection, dtype)
    expected = outcome(equation_1, inputs, selection, torch.float64)
    assert [each.dtype for each in found] == [torch.float32, *[dtype] * 4, torch.float32]
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize("device", DEVICES)
def test_no_slots_leave_the_total_and_give_zero_gradients(device):
    inputs, selection = inputs_of((4, 16, 16, 0, [[], []]), device)
    y_ND, *grads = outcome(fused, inputs, selection, torch.float32)
    assert torch.equal(y_ND, torch.ones_like(y_ND)) and not any(grad.any() for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_operation_is_registered_as_torch_compile_needs_it(device):
    inputs, (index_EK, filled_EK, weight_EK) = inputs_of(SMALL, device)
    column_T = torch.arange(3, device=device).repeat_interleave(6)
    table = TableSlots(index_EK.flatten(), filled_EK.flatten(), column_T, 9, 3)
    leaves = [each.requires_grad_() for each in (*inputs, weight_EK)]
    end_E = torch.tensor([6, 0, 4], device=device)
    arguments = (*leaves[:4], index_EK, leaves[4], end_E, table.slot_NC)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.moma.fused_experts.default, arguments, test_utils=tests)


def model_of(implementation: str, groups: str = "moe_2t2i") -> Transformer:
    config = ModelConfig.model_validate(
        {"groups": groups, "dim": 16, "layers": 1, "heads": 2}
        | {"experts_implementation": implementation}
    )
    return Transformer(config, make_vocabulary(codes=range(20, 40)), (0.5, 0.5))


@pytest.mark.usefixtures("kernels_everywhere")
def test_operations_are_those_of_batched_products_and_not_repeated_by_choice():
    """Counted on tensors without numbers; selective recomputation keeps the kernels' outputs."""
    found = []
    with FakeTensorMode():
        for implementation, how in (("sequential", "none"), ("triton", "selective")):
            model = model_of(implementation)
            recompute(model.layers[0].get_submodule("experts"), how)  # type: ignore[arg-type]
            with FlopCounterMode(display=False) as counter, OperationCounter() as calls:
                model(torch.arange(5, 37).view(2, 16)).head.square().mean().backward()
            found.append((counter.get_total_flops(), calls.counts["moma.fused_experts.default"]))
    (flops, none), (fused_flops, one_a_group) = found
    assert flops == fused_flops and (none, one_a_group) == (0, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels_everywhere")
def test_a_layer_with_the_kernels_is_one_graph():
    with FakeTensorMode():
        experts = model_of("triton").layers[0].get_submodule("experts")
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        x_BSD = torch.randn(2, 16, 16, requires_grad=True)
        compiled(x_BSD, torch.arange(32).view(2, 16) % 2, Routing())[0].sum().backward()
    assert x_BSD.grad is not None and x_BSD.grad.shape == x_BSD.shape


def test_a_cpu_computes_the_same_without_kernels():
    outcomes = []
    for implementation in ("sequential", "triton"):
        model = model_of(implementation)
        model.initialize(0)
        outcomes.append(model(torch.arange(5, 37).view(2, 16)).head)
    assert torch.equal(*outcomes)


@pytest.mark.usefixtures("kernels_everywhere")
def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "moma.model.triton_kernels", raising=False)
    inputs, selection = inputs_of(SMALL)
    with pytest.raises(UserError, match=r"experts_implementation = 'triton' needs Triton"):
        add_fused_outputs(
            torch.zeros(9, 20), inputs[0], experts_of(inputs, selection), ScatterSlots
        )
