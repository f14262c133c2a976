"""Equation 1 for a group of experts by Triton kernels, in which nothing is gathered beforehand.

    hidden_e = SiLU(x[index_e] · gate_e) · (x[index_e] · up_e)     gather, first products, SwiGLU
    y[n] = Σ_e g_e(n) · (hidden_e · down_e)                        second product, weight, sum

One operation for torch.compile, with a backward pass of its own. The kernels run on a GPU; in tests
Triton interprets them on a CPU. Results are deterministic.

Shapes: see `layers.py`; T = E · K slots, C = E columns of the table of `dispatch.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moma.errors import UserError
from moma.model.dispatch import Dispatch, TableSlots
from moma.model.experts import RoutedExperts, add_expert_outputs
from moma.model.grouped import Product, grouped_product
from moma.model.layers import product_dtype

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def add_fused_outputs(
    total_ND: Tensor,
    x_ND: Tensor,
    routed: RoutedExperts,
    dispatch: Dispatch,
    product: Product = grouped_product,
) -> Tensor:
    """See `add_expert_outputs`, which computes it where the kernels do not run.

    The kernels use neither `dispatch` nor `product`.
    """
    dtype = product_dtype(x_ND)  # an operation of our own does not know autocast
    x_ND, weights = x_ND.to(dtype), [weight.to(dtype) for weight in routed[:3]]
    if not uses_kernels(x_ND):
        return add_expert_outputs(total_ND, x_ND, routed, dispatch, product)
    index_EK, filled_EK, weight_EK = routed.selection
    experts, slots = index_EK.shape
    end_E = (filled_EK.flip(1).cumsum(1) > 0).sum(1)  # up to the last slot that is filled
    expert_T = torch.arange(experts, device=x_ND.device).repeat_interleave(slots)
    table = TableSlots(index_EK.flatten(), filled_EK.flatten(), expert_T, len(x_ND), experts)
    y_ND, *_ = fused_experts(x_ND, *weights, index_EK, weight_EK.float(), end_E, table.slot_NC)
    return total_ND + y_ND


def uses_kernels(x_ND: Tensor) -> bool:
    """Whether the kernels support these tokens."""
    return x_ND.device.type == "cuda" and x_ND.dtype in _DTYPES


@torch.library.custom_op("moma::fused_experts", mutates_args=())
def fused_experts(
    x_ND: Tensor,
    gate_EDF: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    index_EK: Tensor,
    weight_EK: Tensor,
    end_E: Tensor,
    slot_NC: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the weighted outputs of the experts for each token.

    Args:
        gate_EDF, up_EDF, down_EFD: weights, of the same dtype.
        index_EK: the token in each slot.
        weight_EK: fp32 weight of the expert's output, g; 0 in an empty slot.
        end_E: number of an expert's slots that are computed; those behind it are empty.
        slot_NC: the slots of each token, −1 for none.

    Returns:
        The sums in fp32 [N, D]; and for the backward pass x · gate and x · up, [T, F].
    """
    kernels = _kernels()
    (experts, slots), (dim, hidden) = index_EK.shape, gate_EDF.shape[1:]
    options = kernels.options(x_ND) | {"D": dim, "F": hidden, "slots": slots}
    gate_TF, up_TF, hidden_TF = (x_ND.new_empty(experts * slots, hidden) for _ in range(3))
    x_ND, index_EK, weight_EK = x_ND.contiguous(), index_EK.contiguous(), weight_EK.contiguous()
    gate_EDF, up_EDF, down_EFD = (w.contiguous() for w in (gate_EDF, up_EDF, down_EFD))
    kernels.hidden_kernel[kernels.tiles(slots, hidden, experts)](
        x_ND, gate_EDF, up_EDF, index_EK, end_E, gate_TF, up_TF, hidden_TF, **options
    )
    z_TD = x_ND.new_empty(experts * slots, dim)
    kernels.output_kernel[kernels.tiles(slots, dim, experts)](
        hidden_TF, down_EFD, weight_EK, end_E, z_TD, **options
    )
    return kernels.sum_slots(z_TD, slot_NC, torch.float32), gate_TF, up_TF


@torch.library.custom_op("moma::fused_experts_backward", mutates_args=())
def fused_experts_backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_EDF: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    index_EK: Tensor,
    weight_EK: Tensor,
    end_E: Tensor,
    slot_NC: Tensor,
    gate_TF: Tensor,
    up_TF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the first four arguments of `fused_experts`, and of `weight_EK`."""
    kernels = _kernels()
    (experts, slots), (dim, hidden) = index_EK.shape, gate_EDF.shape[1:]
    options = kernels.options(x_ND) | {"D": dim, "F": hidden, "slots": slots}
    x_ND, index_EK, weight_EK = x_ND.contiguous(), index_EK.contiguous(), weight_EK.contiguous()
    gate_EDF, up_EDF, down_EFD = (w.contiguous() for w in (gate_EDF, up_EDF, down_EFD))
    grad_ND = grad_ND.to(x_ND.dtype).contiguous()
    grad_gate_TF, grad_up_TF, weighted_TF = (torch.empty_like(gate_TF) for _ in range(3))
    grid = kernels.tiles(slots, hidden, experts)
    grad_weight_PT = weight_EK.new_zeros(grid[0], experts * slots)
    kernels.hidden_backward_kernel[grid](
        *(grad_ND, down_EFD, index_EK, weight_EK, end_E, gate_TF, up_TF),
        *(grad_gate_TF, grad_up_TF, weighted_TF, grad_weight_PT),
        total_slots=experts * slots,
        **options,
    )
    grad_x_TD = x_ND.new_empty(experts * slots, dim)
    kernels.input_backward_kernel[kernels.tiles(slots, dim, experts)](
        grad_gate_TF, grad_up_TF, gate_EDF, up_EDF, end_E, grad_x_TD, **options
    )
    grid = kernels.tiles(dim, hidden, experts)
    weights = torch.empty_like(gate_EDF), torch.empty_like(up_EDF), torch.empty_like(down_EFD)
    factors = (x_ND, grad_gate_TF), (x_ND, grad_up_TF), (grad_ND, weighted_TF)
    for (of_tokens, of_slots), weight in zip(factors, weights, strict=True):
        kernels.weight_backward_kernel[grid](
            *(of_tokens, of_slots, index_EK, end_E, weight),
            IS_TRANSPOSED=weight is weights[2],
            **options,
        )
    grad_x_ND = kernels.sum_slots(grad_x_TD, slot_NC, x_ND.dtype)
    return grad_x_ND, *weights, grad_weight_PT.sum(0).view_as(weight_EK)


def _kernels() -> Any:
    try:
        import moma.model.triton_kernels as kernels
    except ImportError as error:
        raise UserError(
            f"model.experts_implementation = 'triton' needs Triton ({error}), which PyTorch for a "
            "GPU installs on Linux; use another implementation"
        ) from error
    return kernels


@fused_experts.register_fake
def _(x_ND: Tensor, gate_EDF: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index_EK = arguments[2]
    gate_TF, up_TF = (x_ND.new_empty(index_EK.numel(), gate_EDF.shape[2]) for _ in range(2))
    return x_ND.new_empty(x_ND.shape, dtype=torch.float32), gate_TF, up_TF


@fused_experts_backward.register_fake
def _(grad_ND: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    x_ND, gate_EDF, up_EDF, down_EFD, _, weight_EK = arguments[:6]
    return tuple(
        each.new_empty(each.shape) for each in (x_ND, gate_EDF, up_EDF, down_EFD, weight_EK)
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.set_materialize_grads(False)  # of outputs that are only saved


def _backward(ctx: Any, grad_ND: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *grads, grad_weight_EK = fused_experts_backward(grad_ND, *ctx.saved_tensors)
    return *grads, None, grad_weight_EK, None, None


fused_experts.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.moma.fused_experts)
def _flops(x: Any, gate: Any, up: Any, down: Any, index: Any, *_: Any, **__: Any) -> int:
    return 6 * index[0] * index[1] * gate[1] * gate[2]


@register_flop_formula(torch.ops.moma.fused_experts_backward)
def _backward_flops(grad: Any, *shapes: Any, **__: Any) -> int:
    return 2 * _flops(*shapes)
