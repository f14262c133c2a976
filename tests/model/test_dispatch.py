"""Moving tokens to experts and back: both implementations against loops, forward and backward."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model.architecture import ModelConfig
from moma.model.dispatch import ScatterSlots, TableSlots, dispatch_for
from moma.model.groups import named_groups
from moma.model.implementations import ImplementationName, build_experts, build_group
from moma.model.routing import Routing
from moma.model.transformer import Transformer
from moma.vocabulary import MODALITIES
from tests.factories import make_vocabulary

TOKENS, WIDTH, COLUMNS = 7, 3, 4


def drawn_slots(seed: int):
    """Slots in any order, some of them empty; a token is at most once in each column."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randperm(TOKENS * COLUMNS, generator=generator)[:15]
    filled_T = torch.rand(15, generator=generator) < 0.8
    return pairs % TOKENS, filled_T, pairs // TOKENS


def build(dispatch, slots):
    return dispatch(*slots, TOKENS, COLUMNS)


def vectors(rows: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([ScatterSlots, TableSlots]), st.integers(0, 999))
def test_slots_equal_loops_forward_and_backward(dispatch, seed):
    slots = drawn_slots(seed)
    index_T, filled_T, _ = slots
    x_ND, total_ND = (vectors(TOKENS, seed + n).requires_grad_() for n in (1, 2))
    # Empty slots add nothing and receive no gradient, because their weights are zero.
    weight_T1 = filled_T.double()[:, None]
    z_TD = vectors(15, seed + 3).requires_grad_()
    x_TD = build(dispatch, slots).gather(x_ND) * weight_T1
    y_ND = build(dispatch, slots).scatter_add(total_ND, z_TD * weight_T1)
    expected_ND = total_ND.detach().clone()
    for slot in filled_T.nonzero().flatten().tolist():
        assert torch.equal(x_TD[slot], x_ND[index_T[slot]])
        expected_ND[index_T[slot]] += z_TD[slot].detach()
    torch.testing.assert_close(y_ND, expected_ND)
    grad_TD, grad_ND = vectors(15, seed + 4), vectors(TOKENS, seed + 5)
    torch.autograd.backward((x_TD, y_ND), (grad_TD, grad_ND))
    expected_x_ND, expected_z_TD = torch.zeros(TOKENS, WIDTH).double(), torch.zeros_like(z_TD)
    for slot in filled_T.nonzero().flatten().tolist():
        expected_x_ND[index_T[slot]] += grad_TD[slot]
        expected_z_TD[slot] = grad_ND[index_T[slot]]
    torch.testing.assert_close(x_ND.grad, expected_x_ND)
    torch.testing.assert_close(z_TD.grad, expected_z_TD)
    torch.testing.assert_close(total_ND.grad, grad_ND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_do_not_depend_on_the_order_of_slots(dtype):
    """As atomic additions would: sums over experts have many roundings."""
    index_T, column_T = torch.arange(40) % 5, torch.arange(40) // 5
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    outcomes = []
    for order_T in (torch.arange(40), order):
        all_filled = torch.ones(40, dtype=torch.bool)
        table = TableSlots(index_T[order_T], all_filled, column_T[order_T], 5, 8)
        x_ND, z_TD = (vectors(rows, rows, dtype).requires_grad_() for rows in (5, 40))
        y_ND = table.scatter_add(torch.zeros(5, WIDTH), z_TD[order_T])
        gradient_TD = vectors(40, 1, dtype)[order_T]
        torch.autograd.backward((table.gather(x_ND), y_ND), (gradient_TD, torch.ones(5, WIDTH)))
        assert x_ND.grad is not None and z_TD.grad is not None
        outcomes.append((y_ND.detach(), x_ND.grad, z_TD.grad))
    assert [part.dtype for part in outcomes[0]] == [torch.float32, dtype, dtype]
    for first, second in zip(*outcomes, strict=True):
        assert torch.equal(first, second)


def test_gradients_in_bf16_are_summed_in_fp32():
    """Eight gradients of a token, rounded once."""
    slots = TableSlots(torch.zeros(8).long(), torch.ones(8) > 0, torch.arange(8), 1, 8)
    x_ND = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    slots.gather(x_ND).backward(torch.tensor([[1.0]] + [[2**-8]] * 7).bfloat16())
    assert x_ND.grad is not None
    assert x_ND.grad.item() == torch.tensor(1 + 7 / 256).bfloat16().item()


@pytest.mark.parametrize("groups", ["moe_2t2i", "mod_moe_2t2i", "mod_moe_1t1i"])
def test_models_on_a_gpu_equal_those_on_a_cpu(groups):
    config = ModelConfig(groups=groups, dim=16, layers=2, heads=2)
    outcomes = []
    for device in ("cpu", "cuda"):
        dispatch = dispatch_for(torch.device(device))
        model = Transformer(config, make_vocabulary(), (0.5, 0.5), dispatch=dispatch)
        model.initialize(0)
        tokens = torch.arange(5, 37).view(2, 16)
        loss = model(tokens).head.square().mean()
        loss.backward()
        outcomes.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        kinds = {type(module.dispatch) for module in model.modules() if hasattr(module, "dispatch")}
        assert len(kinds) == 1
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", get_args(ImplementationName))
def test_experts_on_a_gpu_are_deterministic(implementation):
    """Also single-expert groups with empty slots, whose rows the grouped product aligns."""
    device = torch.device("cuda")
    for name, fraction in (("moe_4t4i", 1.0), ("moe_1t1i", 0.25)):
        groups = [
            build_group(64, 96, group, (0.5, 0.5), MODALITIES, fraction, dispatch=TableSlots)
            for group in named_groups(name)
        ]
        experts = build_experts(groups, implementation)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        experts.to(device, torch.bfloat16)
        x_BSD = torch.randn(1, 1000, 64, device=device, dtype=torch.bfloat16)
        modality_BS = torch.arange(1000, device=device)[None] % 3 % 2
        outcomes = []
        for _ in range(3):
            experts.zero_grad()
            read_BSD = x_BSD.clone().requires_grad_()
            y_BSD, _ = experts(read_BSD, modality_BS, Routing())
            y_BSD.float().square().sum().backward()
            trained = [p.grad for p in experts.parameters() if p.grad is not None]
            outcomes.append([y_BSD, read_BSD.grad, *trained])
        for other in outcomes[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def test_the_table_serves_gpus():
    assert dispatch_for(torch.device("cuda")) is TableSlots
    assert dispatch_for(torch.device("cpu")) is ScatterSlots
