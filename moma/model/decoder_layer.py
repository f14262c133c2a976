"""A decoder layer: attention and experts, with or without mixture-of-depths.

Shapes: see `layers.py`; R sequences of K selected tokens each, as in `depth.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moma.model.architecture import ModelConfig
from moma.model.attention import Attention
from moma.model.attention_kernels import AttentionKernel, Segments
from moma.model.caches import CachedContext
from moma.model.depth import DepthConfig, DepthRouter
from moma.model.dispatch import Dispatch, ScatterSlots
from moma.model.experts import GroupTokens
from moma.model.implementations import build_experts, build_group
from moma.model.routers import Diagnostics
from moma.model.routing import Routing
from moma.vocabulary import Vocabulary


class TokenContext(NamedTuple):
    """Properties of the tokens of a micro-batch, computed once per forward pass.

    Attributes:
        modality_BS: index of the modality; −1 for padding.
        rotary: rotary cosine and sine, each [B, S, 1, C/2].
        segments: which tokens attend to each other.
        layout: the attention kernel's form of the segments.
        dtype: dtype of queries, keys and values.
        kernel: computes attention.
        group_tokens: the tokens of each group of experts, in layers that all tokens reach.
    """

    modality_BS: Tensor
    rotary: tuple[Tensor, Tensor]
    segments: Segments
    layout: Any
    dtype: torch.dtype
    kernel: AttentionKernel
    group_tokens: list[GroupTokens | None] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within segments; see `AttentionKernel`."""
        return self.kernel(query, key, value, self.layout)

    def select(self, index_RK: Tensor, filled_RK: Tensor) -> "TokenContext":
        """Return the context of selected tokens, given their indices, [R, K].

        Tokens in empty slots become padding, which no other token attends to.
        """
        cosine, sine = (
            angle.expand(*self.modality_BS.shape, -1, -1).flatten(0, 1)[index_RK]
            for angle in self.rotary
        )
        segments = self.segments.select(index_RK)
        return self._replace(
            modality_BS=self.modality_BS.flatten()[index_RK].where(filled_RK, -1),
            rotary=(cosine, sine),
            segments=segments,
            layout=self.kernel.layout(segments, self.dtype),
            group_tokens=None,
        )


LayerContext = TokenContext | CachedContext


class DecoderLayer(nn.Module):
    """Attention and experts, each with a residual connection.

    Swin norm: h = x + norm(attention(x)), y = h + norm(experts(h)) (arXiv 2111.09883; MoMa §2.2);
    a token that no expert selects keeps h. Pre-norm: h = x + attention(norm(x)), y = h +
    experts(norm(h)).

    Args:
        config, vocabulary, shares, dispatch: as for `Transformer`.
        token_fraction: fraction of all tokens that attention and experts process.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        shares: Sequence[float],
        dispatch: Dispatch,
        token_fraction: float = 1.0,
    ):
        super().__init__()
        self.swin = config.norm == "swin"
        self.attention = Attention(
            config.dim, config.heads, config.key_heads, config.query_key_norm
        )
        width, names, noise = config.hidden_width, vocabulary.modalities, bool(config.router_noise)
        groups = [
            build_group(
                config.dim,
                width,
                group,
                shares,
                names,
                token_fraction,
                noise,
                dispatch,
                config.token_choice_config,
            )
            for group in config.group_list
        ]
        self.experts = build_experts(groups, config.implementation)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.experts_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BSD: Tensor, context: LayerContext, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Map [B, S, D] to [B, S, D]; return diagnostics of the output, then of the routers."""
        _, h_BSD, experts_in_BSD = self.attend(x_BSD, context)
        experts_BSD, diagnostics = self.experts(
            experts_in_BSD, context.modality_BS, routing, context.group_tokens
        )
        y_BSD = self.add_experts(h_BSD, experts_BSD)
        return y_BSD, [_check(y_BSD, routing), *diagnostics]

    def attend(self, x_BSD: Tensor, context: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual branch of attention, its sum with x, and the experts' input."""
        attention_in_BSD = x_BSD if self.swin else self.attention_norm(x_BSD)
        attention_BSD = self.attention(attention_in_BSD, context)
        attention_BSD = self.attention_norm(attention_BSD) if self.swin else attention_BSD
        attention_BSD = self.dropout(attention_BSD)
        h_BSD = x_BSD + attention_BSD
        return attention_BSD, h_BSD, h_BSD if self.swin else self.experts_norm(h_BSD)

    def add_experts(self, total_BSD: Tensor, experts_BSD: Tensor) -> Tensor:
        """Add the residual branch of the experts, given their output."""
        experts_BSD = self.experts_norm(experts_BSD) if self.swin else experts_BSD
        return total_BSD + self.dropout(experts_BSD)

    def compile_around_experts(self, **options: Any) -> None:
        """Compile what runs before and after the experts, with options of `torch.compile`."""
        for name in ("attend", "add_experts"):
            setattr(self, name, torch.compile(getattr(self, name), **options))


class DepthLayer(DecoderLayer):
    """A layer with mixture-of-depths: tokens that are not selected are left unchanged (§2.3)."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        shares: Sequence[float],
        dispatch: Dispatch,
        depth: DepthConfig,
    ):
        own = depth.layer_shares(shares, vocabulary.modalities)
        super().__init__(config, vocabulary, own[0], dispatch, own[1])
        self.dispatch = dispatch
        self.depth = DepthRouter(config.dim, depth, shares, vocabulary.modalities)

    def forward(
        self, x_BSD: Tensor, context: LayerContext, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Map [B, S, D] to [B, S, D]; the depth router's diagnostics come last."""
        segments = context.segments.id_RS if isinstance(context, TokenContext) else None
        selection, depth_diagnostics = self.depth(x_BSD, context.modality_BS, routing, segments)
        x_ND, index_RK = x_BSD.flatten(0, 1), selection.index_EK
        index_T, filled_T = index_RK.flatten(), selection.filled_EK.flatten()
        selected = context.select(index_RK, selection.filled_EK)
        if not index_RK.shape[1]:  # possible without slots only
            # Ranks that select tokens wait for the others to gather the experts' weights with them.
            _, diagnostics = self.experts(x_BSD[:, :0], context.modality_BS[:, :0], routing)
            of_experts = _scattered(diagnostics, index_T, len(x_ND))
            return x_BSD, [_check(x_BSD, routing), *of_experts, depth_diagnostics]
        slots = self.dispatch(index_T, filled_T, torch.zeros_like(index_T), len(x_ND), 1)
        x_RKD = slots.gather(x_ND).unflatten(0, index_RK.shape)
        attention_RKD, _, experts_in_RKD = self.attend(x_RKD, selected)
        experts_RKD, diagnostics = self.experts(
            experts_in_RKD, selected.modality_BS, routing, selected.group_tokens
        )
        update_RKD = self.add_experts(attention_RKD, experts_RKD) * selection.score_EK[..., None]
        y_ND = slots.scatter_add(x_ND, update_RKD.flatten(0, 1).to(x_ND.dtype))
        of_experts = _scattered(diagnostics, index_T, len(x_ND))
        return y_ND.view_as(x_BSD), [_check(y_ND, routing), *of_experts, depth_diagnostics]


def _scattered(
    diagnostics: Sequence[Diagnostics], index_T: Tensor, tokens: int
) -> list[Diagnostics]:
    """The diagnostics of the experts, with records of all tokens instead of the selected ones."""
    return [
        each._replace(record=each.record and each.record.scatter(index_T, tokens))
        for each in diagnostics
    ]


def _check(y_BSD: Tensor, routing: Routing) -> Diagnostics:
    """Flag a non-finite output: one such value makes the sum non-finite, in a single pass."""
    return Diagnostics(~y_BSD.detach().sum().isfinite() if routing.checks else None)


def build_layer(
    number: int,
    config: ModelConfig,
    vocabulary: Vocabulary,
    shares: Sequence[float],
    dispatch: Dispatch = ScatterSlots,
) -> DecoderLayer:
    """Build layer `number` of a model, counted from 0."""
    depth = config.depth_config
    if depth is not None and number in config.depth_layers:
        return DepthLayer(config, vocabulary, shares, dispatch, depth)
    return DecoderLayer(config, vocabulary, shares, dispatch)
