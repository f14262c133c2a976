"""Kernels of a GPU for attention within the documents of packed sequences.

- `VarlenAttention`: flash attention over sequences of different lengths, without a mask; half
  precision.
- `FlexAttention`: a block-sparse kernel that torch.compile generates; any precision.

Only imported where they are used: their libraries take seconds. Shapes: see `attention_kernels.py`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from moma.model.attention_kernels import Segments


class VarlenLayout(NamedTuple):
    """Segments as flash attention takes them.

    Attributes:
        ends_M1: end of each segment among the flattened tokens, after a 0, int32 [M + 1]; segments
            beyond the last one are empty, so that the shape is static.
        max_length: see `Segments`.
    """

    ends_M1: Tensor
    max_length: int


class VarlenAttention:
    """Flash attention over segments (`torch.nn.attention.varlen`)."""

    is_compiled = False

    def layout(self, segments: Segments, dtype: torch.dtype) -> VarlenLayout:
        """Return the ends of the segments."""
        id_N = segments.id_RS.flatten()
        ends_M1 = id_N.new_zeros(segments.max_segments + 1, dtype=torch.int32)
        ends_M1 = ends_M1.scatter_add(0, id_N + 1, torch.ones_like(id_N, dtype=torch.int32))
        return VarlenLayout(ends_M1.cumsum(0, dtype=torch.int32), segments.max_length)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout) -> Tensor:
        """See `AttentionKernel`."""
        # Expanded, since enable_gqa is missing in torch 2.11.
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        ends_M1, length = layout
        y_NHC = varlen_attn(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            ends_M1,
            ends_M1,
            length,
            length,
            window_size=(-1, 0),
        )
        assert isinstance(y_NHC, Tensor)
        return y_NHC.view_as(query)


class FlexAttention:
    """`flex_attention`, which skips blocks without a pair in the same segment."""

    is_compiled = True

    def layout(self, segments: Segments, dtype: torch.dtype) -> Any:
        """Return the block mask."""
        id_RS = segments.id_RS
        sequences, size = id_RS.shape

        def attends(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (id_RS[sequence, query] == id_RS[sequence, key]) & (query >= key)

        return create_block_mask(attends, sequences, None, size, size, device=id_RS.device.type)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Any) -> Tensor:
        """See `AttentionKernel`."""
        y_RHSC = _flex_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask=layout,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return y_RHSC.transpose(1, 2)


# Not compiled, it would store all S² products.
_flex_attention = torch.compile(flex_attention, dynamic=False)
