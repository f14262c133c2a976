"""Products of experts in float8 (e4m3), scaled by row (optional).

    y = R(x) · R(wᵀ)ᵀ,    ∂x = R(∂y) · R(w)ᵀ,    ∂w = xᵀ · ∂y

R scales each row by the largest power of two that fits, and rounds. The gradient of the weights is
not rounded, as in torchao's recipe `rowwise_with_gw_hp` for linear layers: in float8, PyTorch's
kernel needs a multiple of 16 rows of each expert for it (GroupMMCommon.cuh), and ours are not
aligned to 16.

Shapes: see `layers.py`; as in `grouped.py`, T rows may be [E, K].
"""

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from moma.model.experts import ExpertGroup
from moma.model.grouped import grouped_outer, grouped_product
from moma.model.implementations import JointMixtureOfExperts
from moma.model.layers import product_dtype, upcast
from moma.runtime.float8 import WIDTH_MULTIPLE

logger = logging.getLogger(__name__)

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
# Smaller magnitudes are not scaled up to `_LARGEST`: the scale stays finite, as in torchao.
_SMALLEST = 1e-12


def use_float8_experts(
    model: nn.Module, how: Literal["off", "on", "emulate"], device: torch.device
) -> None:
    """Compute the products of stacked experts in float8 if `engine.float8` says so.

    With `on` they stay as they are, with a warning, on a device without grouped products in float8.
    The Triton kernels of `fused_experts.py` are not changed: `Recipe` refuses float8 with them.

    Args:
        model: is changed in place; parameters stay the same.
        how: `emulate` only rounds to float8, on any device.
    """
    kinds = (ExpertGroup, JointMixtureOfExperts)
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    if how == "off" or not modules:
        return
    if how == "on" and not _has_kernel(device):
        logger.warning(
            "engine.float8: experts stay in engine.compute, because PyTorch has grouped products "
            "in float8 for NVIDIA GPUs of compute capability 9.0 (H100, H200) only"
        )
        return
    for module in modules:
        module.product = partial(float8_product, emulate=how == "emulate")


def _has_kernel(device: torch.device) -> bool:
    """Whether PyTorch has grouped products in float8: its kernel is for Hopper (ScaledGroupMM.cu).

    AMD's GPUs have compute capabilities of 9, too, but another float8.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def float8_product(
    x_TD: Tensor, weights: Sequence[Tensor], end_E: Tensor | None, emulate: bool
) -> Tensor:
    """See `grouped_product`, which computes it if a width is not a multiple of 16.

    Args:
        emulate: compute the product of the rounded factors in their dtype, on any device.
    """
    if not x_TD.numel() or any(width % WIDTH_MULTIPLE for width in weights[0].shape[1:]):
        return grouped_product(x_TD, weights, end_E)
    dtype = product_dtype(x_TD)  # operations of our own do not know autocast
    stack_EDF = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
    y_TF: Tensor = _Float8Product.apply(x_TD.to(dtype), stack_EDF.to(dtype), end_E, emulate)
    return y_TF


class _Float8Product(torch.autograd.Function):
    """Rounds again in the backward pass: saved, rounded weights would outlive FSDP's gathering.

    What is saved is the gathered weights, of which FSDP frees the memory, unless they had to be
    converted or concatenated from several stacks.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, stack_EDF: Tensor, end_E: Tensor | None, emulate: bool
    ) -> Tensor:
        ctx.save_for_backward(x_TD, stack_EDF, end_E)
        ctx.emulate = emulate
        return _multiply(x_TD, stack_EDF.mT, end_E, emulate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_TD, stack_EDF, end_E), (grad_TF,) = ctx.saved_tensors, grads
        grad_x_TD = grad_EDF = None
        if ctx.needs_input_grad[0]:
            grad_x_TD = _multiply(grad_TF, stack_EDF, end_E, ctx.emulate)
        if ctx.needs_input_grad[1]:  # the gradient of a sum has zero strides
            grad_EDF = grouped_outer(x_TD, grad_TF.contiguous(), end_E, len(stack_EDF))
        return grad_x_TD, grad_EDF, None, None


def _multiply(x_TD: Tensor, stack_EFD: Tensor, end_E: Tensor | None, emulate: bool) -> Tensor:
    """Compute x · Wᵀ for the matrix W of each row's expert, [T, F]."""
    rows_TD, factor_T = _round_rows(x_TD)
    rounded_EFD, factor_EF = _round_rows(stack_EFD)
    if not emulate:
        y_TF: Tensor = _scaled_product(rows_TD, rounded_EFD, factor_T, factor_EF, end_E)
        return y_TF.to(x_TD.dtype)
    x_TD = rows_TD.to(x_TD.dtype) * factor_T[..., None].to(x_TD.dtype)
    stack_EFD = rounded_EFD.to(x_TD.dtype) * factor_EF[..., None].to(x_TD.dtype)
    return grouped_product(x_TD, [stack_EFD.mT], end_E)


def _round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return [..., D] in float8, and the factor [...] in fp32 of each row."""
    largest = upcast(x.abs().amax(-1, keepdim=True)).clamp(min=_SMALLEST)
    scale = (_LARGEST / largest).log2().floor().exp2()
    rounded = (upcast(x) * scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return rounded.contiguous(), scale.reciprocal().squeeze(-1)


# PyTorch's operation has no fake kernel, and torch.compile does not accept its enumerations
# (2.13; github.com/pytorch/pytorch/issues/182995).
@torch.library.custom_op("moma::float8_product", mutates_args=())
def _scaled_product(
    x_TD: Tensor, stack_EFD: Tensor, factor_T: Tensor, factor_EF: Tensor, end_E: Tensor | None
) -> Tensor:
    by_row = functional.ScalingType.RowWise
    return functional.scaled_grouped_mm(  # type: ignore[attr-defined]
        *(x_TD, stack_EFD.mT, factor_T, by_row, factor_EF, by_row),
        offs=end_E,
        use_fast_accum=True,
    )


@_scaled_product.register_fake
def _(x_TD: Tensor, stack_EFD: Tensor, *_: Tensor | None) -> Tensor:
    return x_TD.new_empty(*x_TD.shape[:-1], stack_EFD.shape[1], dtype=torch.bfloat16)


@register_flop_formula(torch.ops.moma.float8_product)
def _flops(x_shape: Any, stack_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * int(stack_shape[1])
