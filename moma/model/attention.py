"""Self-attention as in Chameleon: normalised queries and keys, rotary positions, causal.

Shapes: see `layers.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.layers import rotate


def document_mask(documents_BS: Tensor) -> Tensor:
    """Boolean mask [B, 1, S, S]: a token sees itself and what precedes it in its own document."""
    size = documents_BS.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=documents_BS.device).tril()
    same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
    return same & causal


class Attention(nn.Module):
    """Causal multi-head attention with LayerNorm on each head's queries and keys.

    Source: Chameleon (arXiv 2405.09818) §2.3.1, where the norm keeps softmax from drifting when
    modalities compete.
    """

    def __init__(self, dim: int, heads: int, query_key_norm: bool):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        width = dim // heads
        self.query_norm = HeadNorm(heads, width) if query_key_norm else nn.Identity()
        self.key_norm = HeadNorm(heads, width) if query_key_norm else nn.Identity()

    def forward(
        self, x_BSD: Tensor, angles: tuple[Tensor, Tensor], mask_BSS: Tensor | None
    ) -> Tensor:
        """Attend over [B, S, D]; without a mask, over everything before in the row."""
        query, key, value = (
            projection(x_BSD).unflatten(-1, (self.heads, -1))
            for projection in (self.query, self.key, self.value)
        )
        query = rotate(self.query_norm(query), angles)
        key = rotate(self.key_norm(key), angles)
        mixed_BHSC = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask_BSS,
            is_causal=mask_BSS is None,
        )
        return self.output(mixed_BHSC.transpose(1, 2).flatten(-2))


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
