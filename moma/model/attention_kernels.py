"""Causal attention within the documents of packed sequences, by three kernels with equal results.

- `MaskedAttention`: `scaled_dot_product_attention` with a mask [R, 1, S, S]; runs anywhere.
- `VarlenAttention` and `FlexAttention` of `gpu_attention`.

Tokens that mixture-of-depths selects are packed sequences as well, only shorter.

Shapes: see `layers.py`; R sequences of S tokens, G heads of keys and values.
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

KernelName = Literal["masked", "varlen", "flex"]

HALF = (torch.float16, torch.bfloat16)


class Segments(NamedTuple):
    """Division of packed sequences into segments, within which tokens attend to earlier ones.

    Attributes:
        id_RS: number of each token's segment; does not decrease from one token to the next, nor
            from the end of a sequence to the start of the following one.
        max_segments: upper bound of the number of segments, known on the host.
        max_length: upper bound of a segment's length, known on the host.
        is_whole: whether each sequence is one segment, so that causal attention needs no mask.
    """

    id_RS: Tensor
    max_segments: int
    max_length: int
    is_whole: bool = False

    def select(self, index_RK: Tensor) -> "Segments":
        """Return the segments of selected tokens, given their indices in increasing order."""
        return Segments(self.id_RS.flatten()[index_RK], self.max_segments, self.max_length)


def number_segments(document_ids_BS: Tensor, is_padding_BS: Tensor) -> Tensor:
    """Number each run of one document's tokens or of padding, from 0 over all sequences, [B, S]."""
    first_B1 = torch.ones_like(is_padding_BS[:, :1])
    changes_BS = document_ids_BS.diff(dim=1) != 0
    changes_BS = changes_BS | (is_padding_BS[:, 1:] != is_padding_BS[:, :-1])
    starts_BS = torch.cat((first_B1, changes_BS), dim=1)
    return (starts_BS.flatten().cumsum(0) - 1).view_as(document_ids_BS)


class AttentionKernel(Protocol):
    """Computes attention; `layout` is computed once for all layers that process the same tokens.

    Attributes:
        is_compiled: whether torch.compile generates it for each shape.
    """

    is_compiled: bool

    def layout(self, segments: Segments, dtype: torch.dtype) -> Any:
        """Convert segments to the kernel's own form, without waiting for the device.

        Args:
            dtype: dtype of queries, keys and values.
        """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Any) -> Tensor:
        """Attend; queries and the result are [R, S, H, C], keys and values [R, S, G, C]."""


class MaskedAttention:
    """`scaled_dot_product_attention`; with an additive mask, unless sequences are whole segments.

    Converted to an additive mask once; with a boolean one, each layer would convert and keep its
    own. Masked products are computed, too: fewer of them because queries are divided into blocks,
    each of which reads the keys up to its end only.

    Args:
        block_size: number of queries of a block.
    """

    is_compiled = False

    def __init__(self, block_size: int = 256) -> None:
        self._block_size = block_size

    def layout(self, segments: Segments, dtype: torch.dtype) -> Tensor | None:
        """0 where a query attends to a key and −∞ elsewhere, [R, 1, S, S]; None: causal."""
        if segments.is_whole:
            return None
        id_RS = segments.id_RS
        size = id_RS.shape[1]
        causal_SS = torch.ones(size, size, dtype=torch.bool, device=id_RS.device).tril()
        attends_R1SS = (id_RS[:, None, :, None] == id_RS[:, None, None, :]) & causal_SS
        mask_R1SS = torch.zeros_like(attends_R1SS, dtype=dtype)
        return mask_R1SS.masked_fill_(~attends_R1SS, -torch.inf)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Tensor | None) -> Tensor:
        """See `AttentionKernel`."""
        if layout is None:
            return _attend(query, key, value, None)
        if layout.dtype != value.dtype:
            raise TypeError(f"the mask is {layout.dtype}, but the values are {value.dtype}")
        # Grouped queries with a mask would fall back to a kernel that stores all S² products.
        repeats = query.shape[2] // key.shape[2]
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        length, size = query.shape[1], self._block_size
        ends = [min(end, length) for end in range(size, max(length, 1) + size, size)]
        parts = [
            _attend(query[:, start:end], key[:, :end], value[:, :end], layout[..., start:end, :end])
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend by a mask, or causally without one."""
    return functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    ).transpose(1, 2)


def kernel_without_compilation(kernel: AttentionKernel) -> AttentionKernel:
    """The kernel for passes of many shapes, for each of which `kernel` may have to be compiled."""
    return MaskedAttention() if kernel.is_compiled else kernel


def attention_kernel(
    device: torch.device, dtype: torch.dtype, head_width: int, deterministic: bool = False
) -> AttentionKernel:
    """The fastest kernel; see `kernel_name`."""
    name = kernel_name(device, dtype, head_width, deterministic)
    if name == "masked":
        return MaskedAttention()
    from moma.model.gpu_attention import FlexAttention, VarlenAttention  # takes seconds

    return VarlenAttention() if name == "varlen" else FlexAttention()


def kernel_name(
    device: torch.device, dtype: torch.dtype, head_width: int, deterministic: bool = False
) -> KernelName:
    """Choose the fastest kernel.

    Args:
        head_width: width C of a head; flash attention takes multiples of 8 up to 256,
            `flex_attention` at least 16.
        deterministic: leave out flash attention, whose backward pass adds the gradients of queries
            in an order that changes from run to run.
    """
    if device.type != "cuda":
        return "masked"
    # Flash attention needs an Ampere GPU; without a GPU this is a plan for one.
    is_recent = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    has_flash = is_recent and dtype in HALF and head_width % 8 == 0 and head_width <= 256
    if has_flash and not deterministic:
        return "varlen"
    return "flex" if head_width >= 16 else "masked"
