"""Causal self-attention as in Chameleon: query-key normalisation and rotary embedding.

Shapes: see `layers.py`; G heads of keys and values, W length of a window, T number of windows.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.layers import rotate


class AttentionMask(NamedTuple):
    """Which earlier tokens each token attends to.

    Attributes:
        mask: boolean, true where a query attends to a key, or its `additive_mask`, [B, 1, S, S];
            None: causal over the whole sequence. With windows, [T, 1, W, 2 · W], T = ⌈S / W⌉.
        window: length W of the windows that one long sequence is split into. A token attends only
            within its own window and the one before, so the cost grows with S · W instead of S².
    """

    mask: Tensor | None = None
    window: int | None = None


def document_mask(documents_BS: Tensor) -> Tensor:
    """Return a boolean mask [B, 1, S, S]: causal attention within each document."""
    size = documents_BS.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=documents_BS.device).tril()
    same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
    return same & causal


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask to 0 where a query attends to a key and −∞ elsewhere.

    For a mask that layers share: given a boolean one, every layer would convert and keep its own.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def selected_mask(
    sequence_RK: Tensor, document_RK: Tensor, filled_RK: Tensor, sequence_length: int
) -> AttentionMask:
    """Return the mask among tokens selected from several sequences, in batch order.

    A token attends to itself and to earlier selected tokens of its own sequence and document. An
    empty slot attends only to itself, and no token attends to it.

    Args:
        sequence_RK, document_RK: sequence and document of the token in each slot.
        filled_RK: whether a slot holds a token.
        sequence_length: length S of the original sequences. If all slots form a single sequence
            (R = 1) longer than 2 · S, windows of length S contain all that a token may attend to.
    """
    slot_RK = torch.arange(sequence_RK.shape[1], device=sequence_RK.device).expand_as(sequence_RK)
    parts = (slot_RK, sequence_RK, document_RK, filled_RK.to(slot_RK.dtype))
    ids = torch.stack(parts, dim=-1)
    if len(sequence_RK) > 1 or sequence_RK.shape[1] <= 2 * sequence_length:
        return AttentionMask(_visible(ids, ids))
    windows = _split_windows(ids, sequence_length, padding=-1)
    mask = _visible(windows, _with_previous_window(windows, padding=-1))
    return AttentionMask(mask, sequence_length)


def _visible(query_RQI: Tensor, key_RKI: Tensor) -> Tensor:
    """Boolean mask [R, 1, Q, K] from slot, sequence, document and filled of queries and keys."""
    query_slot, query_sequence, query_document, _ = query_RQI[:, :, None].unbind(-1)
    slot, sequence, document, filled = key_RKI[:, None].unbind(-1)
    same = (sequence == query_sequence) & (document == query_document)
    return (same & (slot <= query_slot) & ((filled == 1) | (slot == query_slot)))[:, None]


def _split_windows(x_1S: Tensor, window: int, padding: float = 0) -> Tensor:
    """Split [1, S, …] into windows [T, W, …], padding the last one."""
    missing = -x_1S.shape[1] % window
    rest = x_1S.new_full((1, missing, *x_1S.shape[2:]), padding)
    return torch.cat((x_1S, rest), dim=1).unflatten(1, (-1, window))[0]


def _with_previous_window(x_TW: Tensor, padding: float = 0) -> Tensor:
    """Prepend to each window the one before it, [T, W, …] to [T, 2 · W, …]."""
    previous = torch.cat((torch.full_like(x_TW[:1], padding), x_TW[:-1]))
    return torch.cat((previous, x_TW), dim=1)


class Attention(nn.Module):
    """Causal multi-head attention with LayerNorm on the queries and keys of each head.

    The norm keeps the softmax stable when modalities compete (Chameleon, arXiv 2405.09818 §2.3.1).
    With fewer key and value heads than query heads this is grouped-query attention (arXiv
    2305.13245).

    Args:
        dim, heads: width D and number of query heads H.
        kv_heads: number of key and value heads G, a divisor of H.
        query_key_norm: whether queries and keys are normalised.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, query_key_norm: bool):
        super().__init__()
        self.width = dim // heads
        self.grouped = kv_heads < heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.value = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.query_norm = HeadNorm(heads, self.width) if query_key_norm else nn.Identity()
        self.key_norm = HeadNorm(kv_heads, self.width) if query_key_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, angles: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
        """Attend over [B, S, D].

        Args:
            x_BSD: tokens.
            angles: `rotary_angles` of the tokens' positions.
            mask: which tokens each one attends to.
        """
        query, key, value = (
            projection(x_BSD).unflatten(-1, (-1, self.width))
            for projection in (self.query, self.key, self.value)
        )
        query = rotate(self.query_norm(query), angles)
        key = rotate(self.key_norm(key), angles)
        if mask.window is None:
            y_BSHC = self._attend(query, key, value, mask.mask)
        else:
            query = _split_windows(query, mask.window)
            key, value = (
                _with_previous_window(_split_windows(x, mask.window)) for x in (key, value)
            )
            windows = self._attend(query, key, value, mask.mask)
            y_BSHC = windows.flatten(0, 1)[None, : x_BSD.shape[1]]
        return self.output(y_BSHC.flatten(-2))

    def _attend(
        self, query_BSHC: Tensor, key_BSGC: Tensor, value_BSGC: Tensor, mask: Tensor | None
    ) -> Tensor:
        return functional.scaled_dot_product_attention(
            query_BSHC.transpose(1, 2),
            key_BSGC.transpose(1, 2),
            value_BSGC.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        ).transpose(1, 2)


class HeadNorm(nn.Module):
    """LayerNorm over each head's width, with a weight and a bias per head."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x_BSHC: Tensor) -> Tensor:
        """Normalise [B, S, H, C] over C."""
        normed = functional.layer_norm(x_BSHC, x_BSHC.shape[-1:], eps=1e-5)
        return normed * self.weight + self.bias
