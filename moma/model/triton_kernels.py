"""Triton kernels of a group of experts; `fused_experts.py` describes what they compute together.

A program computes a tile of ROWS rows and COLUMNS columns of a result, and sums STEP terms at a
time. Each number of a result is written by one program, so that results are deterministic. Only
imported where the kernels run.

Shapes: see `layers.py`; stacks of weights are [E·D, F] or [E·F, D]. Expert e has the slots from
e · K on, of which those before end_E[e] are computed; index_EK has the token in each slot.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Interpreted kernels (TRITON_INTERPRET=1) cannot multiply bf16.
_IS_INTERPRETED = triton.knobs.runtime.interpret
_PRODUCT_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float32 if _IS_INTERPRETED else tl.float16,
    torch.bfloat16: tl.float32 if _IS_INTERPRETED else tl.bfloat16,
}
_ROWS, _COLUMNS = 128, 128
_STEP_BYTES = 128
_SUMMED_TILE = 8, 512


def options(x: Tensor) -> dict[str, Any]:
    """The options of all kernels with products, for the dtype of x."""
    return {
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "STEP": _STEP_BYTES // x.element_size(),
        "DTYPE": _PRODUCT_DTYPES[x.dtype],
        "num_warps": 8,
        "num_stages": 3,
    }


def tiles(rows: int, columns: int, experts: int) -> tuple[int, int, int]:
    """The grid of a kernel with products; neighbors read the same rows."""
    return triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _ROWS), experts


def sum_slots(z_TD: Tensor, slot_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the vectors of each token's slots (−1: no slot), [N, D]."""
    (tokens, columns), dim = slot_NC.shape, z_TD.shape[1]
    y_ND = z_TD.new_empty(tokens, dim, dtype=dtype)
    rows, width = _SUMMED_TILE
    grid = triton.cdiv(tokens, rows), triton.cdiv(dim, width)
    sum_kernel[grid](z_TD, slot_NC, y_ND, tokens, D=dim, C=columns, ROWS=rows, COLUMNS=width)
    return y_ND


@triton.jit
def _load(matrix, row, is_row, column, width: tl.constexpr):
    """Load a tile of a matrix with rows of a width; zeros outside of it."""
    inside = is_row[:, None] & (column < width)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * width + column[None, :], inside, other=0.0)


@triton.jit
def _store(matrix, row, is_row, column, width: tl.constexpr, tile):
    """Store a tile of a matrix with rows of a width."""
    inside = is_row[:, None] & (column < width)[None, :]
    to = matrix + row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(to, tile.to(matrix.dtype.element_ty), inside)


@triton.jit
def _multiply(a, b, total, DTYPE: tl.constexpr):
    """Total + a · b, summed in fp32."""
    return tl.dot(a.to(DTYPE), b.to(DTYPE), total, input_precision="ieee")


@triton.jit
def _tile(end_E, slots, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The expert of this program, its slots, which of them are computed, and its columns."""
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    return expert, expert * slots + row, row < tl.load(end_E + expert), column


@triton.jit
def hidden_kernel(
    x_ND,
    gate_EDF,
    up_EDF,
    index_EK,
    end_E,
    gate_TF,
    up_TF,
    hidden_TF,
    slots,
    D: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Hidden = SiLU(x · gate) · (x · up) of the tokens in the slots; gate and up are kept, too."""
    expert, slot, is_slot, f = _tile(end_E, slots, ROWS, COLUMNS)
    token = tl.load(index_EK + slot, is_slot, other=0)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, STEP):
        d = start + tl.arange(0, STEP)
        x = _load(x_ND, token, is_slot, d, D)
        gate = _multiply(x, _load(gate_EDF, expert * D + d, d < D, f, F), gate, DTYPE)
        up = _multiply(x, _load(up_EDF, expert * D + d, d < D, f, F), up, DTYPE)
    _store(gate_TF, slot, is_slot, f, F, gate)
    _store(up_TF, slot, is_slot, f, F, up)
    _store(hidden_TF, slot, is_slot, f, F, gate * tl.sigmoid(gate) * up)


@triton.jit
def output_kernel(
    hidden_TF,
    down_EFD,
    weight_EK,
    end_E,
    z_TD,
    slots,
    D: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Z = weight · (hidden · down)."""
    expert, slot, is_slot, d = _tile(end_E, slots, ROWS, COLUMNS)
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, F, STEP):
        f = start + tl.arange(0, STEP)
        down = _load(down_EFD, expert * F + f, f < F, d, D)
        z = _multiply(_load(hidden_TF, slot, is_slot, f, F), down, z, DTYPE)
    weight = tl.load(weight_EK + slot, is_slot, other=0.0)
    _store(z_TD, slot, is_slot, d, D, weight[:, None] * z)


@triton.jit
def sum_kernel(
    z_TD,
    slot_NC,
    y_ND,
    tokens,
    D: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Y = the sum of z over a token's slots, in the order of the experts; −1: no slot."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column in range(0, C):
        slot = tl.load(slot_NC + token * C + column, token < tokens, other=-1)
        y += _load(z_TD, slot, slot >= 0, d, D).to(tl.float32)
    _store(y_ND, token, token < tokens, d, D, y)


@triton.jit
def hidden_backward_kernel(
    grad_ND,
    down_EFD,
    index_EK,
    weight_EK,
    end_E,
    gate_TF,
    up_TF,
    grad_gate_TF,
    grad_up_TF,
    weighted_TF,
    grad_weight_PT,
    slots,
    total_slots,
    D: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradients of gate and up, and weight · hidden, which the gradient of `down` needs.

    With u = grad · downᵀ, the gradient of hidden is weight · u. That of the weight is hidden · u,
    of which each program computes a part, that of its columns.
    """
    expert, slot, is_slot, f = _tile(end_E, slots, ROWS, COLUMNS)
    token = tl.load(index_EK + slot, is_slot, other=0)
    u = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, STEP):
        d = start + tl.arange(0, STEP)
        down = _load(down_EFD, expert * F + f, f < F, d, D)
        u = _multiply(_load(grad_ND, token, is_slot, d, D), tl.trans(down), u, DTYPE)
    gate = _load(gate_TF, slot, is_slot, f, F).to(tl.float32)
    up = _load(up_TF, slot, is_slot, f, F).to(tl.float32)
    weight = tl.load(weight_EK + slot, is_slot, other=0.0)[:, None]
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    slope = sigmoid * (1 + gate * (1 - sigmoid))  # of SiLU
    _store(grad_gate_TF, slot, is_slot, f, F, weight * u * up * slope)
    _store(grad_up_TF, slot, is_slot, f, F, weight * u * silu)
    _store(weighted_TF, slot, is_slot, f, F, weight * hidden)
    part = grad_weight_PT + tl.program_id(0) * total_slots + slot
    tl.store(part, tl.sum(hidden * u, 1), is_slot)


@triton.jit
def input_backward_kernel(
    grad_gate_TF,
    grad_up_TF,
    gate_EDF,
    up_EDF,
    end_E,
    grad_x_TD,
    slots,
    D: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The gradient of x in each slot: grad_gate · gateᵀ + grad_up · upᵀ."""
    expert, slot, is_slot, d = _tile(end_E, slots, ROWS, COLUMNS)
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, F, STEP):
        f = start + tl.arange(0, STEP)
        gate = _load(gate_EDF, expert * D + d, d < D, f, F)
        grad = _multiply(_load(grad_gate_TF, slot, is_slot, f, F), tl.trans(gate), grad, DTYPE)
    for start in range(0, F, STEP):
        f = start + tl.arange(0, STEP)
        up = _load(up_EDF, expert * D + d, d < D, f, F)
        grad = _multiply(_load(grad_up_TF, slot, is_slot, f, F), tl.trans(up), grad, DTYPE)
    _store(grad_x_TD, slot, is_slot, d, D, grad)


@triton.jit
def weight_backward_kernel(
    tokens_ND,
    slots_TF,
    index_EK,
    end_E,
    weight_EDF,
    slots,
    D: tl.constexpr,
    F: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The sum over an expert's slots of tokenᵀ · slot, [D, F]; stored as [F, D] if transposed."""
    expert = tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(end_E + expert)
    weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, end, STEP):
        row = start + tl.arange(0, STEP)
        slot = expert * slots + row
        token = tl.load(index_EK + slot, row < end, other=0)
        of_tokens = _load(tokens_ND, token, row < end, d, D)
        of_slots = _load(slots_TF, slot, row < end, f, F)
        weight = _multiply(tl.trans(of_tokens), of_slots, weight, DTYPE)
    if IS_TRANSPOSED:
        _store(weight_EDF, expert * F + f, f < F, d, D, tl.trans(weight))
    else:
        _store(weight_EDF, expert * D + d, d < D, f, F, weight)
