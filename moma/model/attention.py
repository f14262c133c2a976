"""Causal self-attention as in Chameleon: query-key normalization and rotary embedding.

Shapes: see `layers.py`; G heads of keys and values.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.layers import rotate


class AttentionContext(Protocol):
    """What attention needs to know about the tokens."""

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """`rotary_cos_sin` of the tokens' positions."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; queries and the result are [B, S, H, C], keys and values [B, S, G, C]."""


class Attention(nn.Module):
    """Causal multi-head attention with LayerNorm on the queries and keys of each head.

    The norm keeps the softmax stable when modalities compete (Chameleon, arXiv 2405.09818 §2.3).
    With fewer key and value heads than query heads this is grouped-query attention (arXiv
    2305.13245).

    Args:
        dim, heads: width D and number of query heads H.
        kv_heads: number of key and value heads G, a divisor of H.
        query_key_norm: whether queries and keys are normalized.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, query_key_norm: bool):
        super().__init__()
        self.width = dim // heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.value = nn.Linear(dim, kv_heads * self.width, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.query_norm = HeadNorm(heads, self.width) if query_key_norm else nn.Identity()
        self.key_norm = HeadNorm(kv_heads, self.width) if query_key_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, context: AttentionContext) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        query, key, value = (
            projection(x_BSD).unflatten(-1, (-1, self.width))
            for projection in (self.query, self.key, self.value)
        )
        # Norms and rotation may compute in fp32, even under autocast.
        query = rotate(self.query_norm(query), context.rotary).to(value.dtype)
        key = rotate(self.key_norm(key), context.rotary).to(value.dtype)
        return self.output(context.attend(query, key, value).flatten(-2))


class HeadNorm(nn.Module):
    """LayerNorm over each head's width, with a weight and a bias per head."""

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x_BSHC: Tensor) -> Tensor:
        """Normalize [B, S, H, C] over C."""
        normed = functional.layer_norm(x_BSHC, x_BSHC.shape[-1:], eps=1e-5)
        return normed * self.weight + self.bias
