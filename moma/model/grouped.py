"""Grouped matrix product: the rows of each expert times the expert's matrix.

    y[start_e : end_e] = x[start_e : end_e] @ weight_e

`torch.nn.functional.grouped_mm` computes it in one kernel; it is used in bf16 on a GPU if widths
are multiples of 16 bytes. Elsewhere it fails (fp64, other widths), cannot be compiled (fp32,
torch 2.13) or is 60 times slower (bf16 on a CPU); there, one product per expert is used.

Shapes: T rows of width D become rows of width F; E counts the experts of all weight stacks.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from moma.model.layers import product_dtype


class Product(Protocol):
    """A product of the rows of each expert and the expert's matrix, as `grouped_product`."""

    def __call__(self, x_TD: Tensor, weights: Sequence[Tensor], end_E: Tensor | None) -> Tensor:
        """Multiply, [T, D] to [T, F]."""


def grouped_product(x_TD: Tensor, weights: Sequence[Tensor], end_E: Tensor | None) -> Tensor:
    """Multiply the rows of each expert by its matrix, [T, D] to [T, F].

    Args:
        x_TD: rows, sorted by expert; [E, K, D] if each expert has K rows.
        weights: stacks of matrices [E', D, F]; the sum of all E' is E. One stack for [E, K, D].
        end_E: int32 index one past each expert's last row; T for the last expert. None for
            [E, K, D].
    """
    if end_E is None:
        return x_TD @ weights[0]
    dtype = product_dtype(x_TD)  # neither implementation supports autocast
    x_TD, weights = x_TD.to(dtype), [weight.to(dtype) for weight in weights]
    if uses_kernel(x_TD, weights[0]):
        stack_EDF = weights[0] if len(weights) == 1 else torch.cat(tuple(weights))
        return functional.grouped_mm(x_TD, stack_EDF, offs=end_E)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _product(x_TD, list(weights), end_E)
    return _multiply(x_TD, weights, end_E)


def grouped_outer(x_TD: Tensor, y_TF: Tensor, end_E: Tensor | None, experts: int) -> Tensor:
    """Compute x.T @ y over the rows of each expert, [E, D, F]: the gradient of a stack of weights.

    Args:
        x_TD, y_TF: of the same dtype; rows and `end_E` as for `grouped_product`.
    """
    if end_E is None:
        return x_TD.mT @ y_TF
    if uses_kernel(x_TD, y_TF[None]):
        return functional.grouped_mm(x_TD.mT, y_TF, offs=end_E)
    return _outer(x_TD, y_TF, end_E, [experts])[0]


def uses_kernel(x_TD: Tensor, weight_EDF: Tensor) -> bool:
    """Whether `grouped_mm` supports these inputs and is the faster implementation."""
    widths = (x_TD.shape[1], weight_EDF.shape[2])
    on_gpu = x_TD.device.type == "cuda" and x_TD.dtype == torch.bfloat16
    return on_gpu and len(x_TD) > 0 and not any(width % 8 for width in widths)


def reads_ends_on_device(x_TD: Tensor, weight_EDF: Tensor) -> bool:
    """Whether `grouped_product` computes this without waiting for the device.

    In bf16 too, `grouped_mm` waits on GPUs other than NVIDIA's of compute capability 9 and 10
    (torch 2.11).
    """
    if torch.version.cuda is None or not uses_kernel(x_TD, weight_EDF):
        return False
    return torch.cuda.get_device_capability(x_TD.device)[0] in (9, 10)


def row_alignment(device: torch.device) -> int:
    """Number of which the rows of each expert have to be a multiple on a device.

    The kernel's gradient of the weights is a product over the rows of an expert, which in bf16
    have to begin at multiples of 16 bytes.
    """
    return 8 if device.type == "cuda" else 1


def _multiply(x_TD: Tensor, weights: Sequence[Tensor], end_E: Tensor) -> Tensor:
    y_TF = x_TD.new_empty(len(x_TD), weights[0].shape[2])
    for (start, end), weight_DF in zip(_row_ranges(end_E), _matrices(weights), strict=True):
        if end > start:
            torch.mm(x_TD[start:end], weight_DF, out=y_TF[start:end])
    return y_TF


@torch.library.custom_op("moma::grouped_product", mutates_args=())
def _product(x_TD: Tensor, weights: list[Tensor], end_E: Tensor) -> Tensor:
    return _multiply(x_TD, weights, end_E)


@torch.library.custom_op("moma::grouped_outer", mutates_args=())
def _outer(x_TD: Tensor, y_TF: Tensor, end_E: Tensor, experts: list[int]) -> list[Tensor]:
    """Compute x.T @ y over the rows of each expert, as stacks [E', D, F] with E' from `experts`."""
    shape = (x_TD.shape[1], y_TF.shape[1])
    stacks = [x_TD.new_empty(count, *shape) for count in experts]
    for (start, end), out_DF in zip(_row_ranges(end_E), _matrices(stacks), strict=True):
        torch.mm(x_TD[start:end].T, y_TF[start:end], out=out_DF)
    return stacks


def _row_ranges(end_E: Tensor) -> list[tuple[int, int]]:
    ends = end_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _matrices(stacks: Sequence[Tensor]) -> list[Tensor]:
    return [matrix for stack in stacks for matrix in stack.unbind()]


@_product.register_fake
def _(x_TD: Tensor, weights: list[Tensor], end_E: Tensor) -> Tensor:
    return x_TD.new_empty(len(x_TD), weights[0].shape[2])


@_outer.register_fake
def _(x_TD: Tensor, y_TF: Tensor, end_E: Tensor, experts: list[int]) -> list[Tensor]:
    return [x_TD.new_empty(count, x_TD.shape[1], y_TF.shape[1]) for count in experts]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, weights, end_E = inputs
    ctx.save_for_backward(x_TD, end_E, *weights)


def _backward(ctx: Any, grad_TF: Tensor) -> tuple[Any, ...]:
    x_TD, end_E, *weights = ctx.saved_tensors
    grad_TF = grad_TF.contiguous()  # the gradient of a sum has zero strides
    grad_x_TD, grads = None, [None] * len(weights)
    if ctx.needs_input_grad[0]:
        grad_x_TD = _product(grad_TF, [weight.mT for weight in weights], end_E)
    if any(ctx.needs_input_grad[1]):
        grads = _outer(x_TD, grad_TF, end_E, [len(weight) for weight in weights])
    return grad_x_TD, grads, None


_product.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.moma.grouped_product)
def _product_flops(x_shape: Any, weight_shapes: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shapes[0][2]


@register_flop_formula(torch.ops.moma.grouped_outer)
def _outer_flops(x_shape: Any, y_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * y_shape[1]
