"""Self-attention as in Chameleon: normalised queries and keys, rotary positions, causal.

Shapes: see `layers.py`; G key and value heads, W length of a window.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.layers import rotate


class AttentionMask(NamedTuple):
    """What each token sees of those before it.

    Attributes:
        mask: boolean, true where a query sees a key, or `additive_mask` of it, [B, 1, S, S]; None:
            all that precede in the row. With windows [S / W rounded up, 1, W, 2 · W].
        window: length W of the windows in which one long row is attended to: its tokens see only
            their own window and the one before it, so the cost grows with S · W, not with S².
    """

    mask: Tensor | None = None
    window: int | None = None


def document_mask(documents_BS: Tensor) -> Tensor:
    """Boolean mask [B, 1, S, S]: a token sees itself and what precedes it in its own document."""
    size = documents_BS.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=documents_BS.device).tril()
    same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
    return same & causal


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where a query sees a key, −∞ elsewhere.

    For a mask that several layers share: of a boolean, each makes numbers, and keeps them.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def selected_mask(
    row_RK: Tensor, document_RK: Tensor, filled_RK: Tensor, sequence_length: int
) -> AttentionMask:
    """The mask among tokens picked out of several sequences, in the order of the sequences.

    A token sees the picked ones of its own row and document that stand before it, and itself. An
    empty slot sees itself and is seen by no other.

    Args:
        row_RK, document_RK: row and document of the token in each slot.
        filled_RK: whether a slot holds a token.
        sequence_length: most tokens of a sequence. Where all slots are one sequence (R = 1) of
            more than twice that length, windows of this length hold all that a token may see.
    """
    slot_RK = torch.arange(row_RK.shape[1], device=row_RK.device).expand_as(row_RK)
    ids = torch.stack((slot_RK, row_RK, document_RK, filled_RK.to(slot_RK.dtype)), dim=-1)
    if len(row_RK) > 1 or row_RK.shape[1] <= 2 * sequence_length:
        return AttentionMask(_sees(ids, ids))
    folded = _fold(ids, sequence_length, filler=-1)
    return AttentionMask(_sees(folded, _with_window_before(folded, filler=-1)), sequence_length)


def _sees(query_RQI: Tensor, key_RKI: Tensor) -> Tensor:
    """Boolean [R, 1, Q, K] from slot, row, document and taken of queries and keys."""
    query_slot, query_row, query_document, _ = query_RQI[:, :, None].unbind(-1)
    slot, row, document, taken = key_RKI[:, None].unbind(-1)
    near = (row == query_row) & (document == query_document) & (slot <= query_slot)
    return (near & ((taken == 1) | (slot == query_slot)))[:, None]


def _fold(x_1S: Tensor, window: int, filler: float = 0) -> Tensor:
    """Cut [1, S, …] into windows [S / W rounded up, W, …]; the last one is filled up."""
    missing = -x_1S.shape[1] % window
    rest = x_1S.new_full((1, missing, *x_1S.shape[2:]), filler)
    return torch.cat((x_1S, rest), dim=1).unflatten(1, (-1, window))[0]


def _with_window_before(x_TW: Tensor, filler: float = 0) -> Tensor:
    """Put the window before in front of each, [T, W, …] to [T, 2 · W, …]."""
    before = torch.cat((torch.full_like(x_TW[:1], filler), x_TW[:-1]))
    return torch.cat((before, x_TW), dim=1)


class Attention(nn.Module):
    """Causal multi-head attention with LayerNorm on each head's queries and keys.

    Source: Chameleon (arXiv 2405.09818) §2.3.1, where the norm keeps softmax from drifting when
    modalities compete. With fewer key and value heads than query heads, several of the latter
    share one of the former (grouped queries, arXiv 2305.13245).

    Args:
        dim, heads: width D and query heads H.
        kv_heads: heads G of keys and values, a divisor of H.
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
        """Attend over [B, S, D]; `angles` are those of `rotary_angles` at the tokens' positions."""
        query, key, value = (
            projection(x_BSD).unflatten(-1, (-1, self.width))
            for projection in (self.query, self.key, self.value)
        )
        query = rotate(self.query_norm(query), angles)
        key = rotate(self.key_norm(key), angles)
        if mask.window is None:
            mixed_BSHC = self._mix(query, key, value, mask.mask)
        else:
            query = _fold(query, mask.window)
            key, value = (_with_window_before(_fold(x, mask.window)) for x in (key, value))
            windows = self._mix(query, key, value, mask.mask)
            mixed_BSHC = windows.flatten(0, 1)[None, : x_BSD.shape[1]]
        return self.output(mixed_BSHC.flatten(-2))

    def _mix(
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
    """LayerNorm over the width of each head, with a weight and a bias for every head."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x_BSHC: Tensor) -> Tensor:
        """Normalise [B, S, H, C] over C."""
        normed = functional.layer_norm(x_BSHC, x_BSHC.shape[-1:], eps=1e-5)
        return normed * self.weight + self.bias
