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
from moma.model.dispatch import Dispatch, ScatterSlots, Slots
from moma.model.experts import GroupTokens
from moma.model.implementations import build_experts, build_group
from moma.model.routers import Diagnostics
from moma.model.routing import Routing, Selection
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
        group_tokens: the tokens of each group of experts, in layers without mixture-of-depths.
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


class BeforeExperts(NamedTuple):
    """What the experts of a layer process, and what their output is added to.

    With mixture-of-depths it has only the selected tokens, [R, K] instead of [B, S].

    Attributes:
        x_BSD: the experts' input.
        residual_BSD: what is added to their output: h, or with mixture-of-depths the output of
            attention.
        modality_BS: index of the modality; −1 for padding.
        group_tokens: from `MixtureOfExperts.find_tokens`.
        selection: the tokens that the depth router selected.
        slots: move these from the N tokens to [R·K] and back; None if there are none.
        depth: diagnostics of the depth router.
    """

    x_BSD: Tensor
    residual_BSD: Tensor
    modality_BS: Tensor
    group_tokens: list[GroupTokens | None]
    selection: Selection | None = None
    slots: Slots | None = None
    depth: Diagnostics | None = None


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
        """Map [B, S, D] to [B, S, D].

        Returns:
            The output, and diagnostics: first the layer's, whose `nonfinite` covers its output and
            its routers, then each router's, that of the depth router last.
        """
        given = self.before_experts(x_BSD, context, routing)
        experts_BSD, diagnostics = self.experts(
            given.x_BSD, given.modality_BS, routing, given.group_tokens
        )
        return self.after_experts(x_BSD, given, experts_BSD, diagnostics, routing)

    def before_experts(
        self, x_BSD: Tensor, context: LayerContext, routing: Routing
    ) -> BeforeExperts:
        """Compute all that precedes the experts."""
        attention_BSD = self._attend(x_BSD, context)
        h_BSD = x_BSD + attention_BSD
        modality_BS, group_tokens = context.modality_BS, context.group_tokens
        if group_tokens is None:
            group_tokens = self.experts.find_tokens(modality_BS, routing)
        return BeforeExperts(self._normed(h_BSD), h_BSD, modality_BS, group_tokens)

    def after_experts(
        self,
        x_BSD: Tensor,
        given: BeforeExperts,
        experts_BSD: Tensor,
        diagnostics: list[Diagnostics],
        routing: Routing,
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Compute all that follows the experts, given their output and diagnostics.

        Args:
            x_BSD: the layer's input.
            given: from `before_experts`.

        Returns:
            As `forward`.
        """
        y_BSD = self._add_experts(given.residual_BSD, experts_BSD)
        return y_BSD, [_check(y_BSD, diagnostics, routing), *diagnostics]

    def compile_around_experts(self, **options: Any) -> None:
        """Compile what runs before and after the experts, with options of `torch.compile`."""
        for name in ("before_experts", "after_experts"):
            setattr(self, name, torch.compile(getattr(self, name), **options))

    def _attend(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        """The residual branch of attention."""
        attention_BSD = self.attention(x_BSD if self.swin else self.attention_norm(x_BSD), context)
        return self.dropout(self.attention_norm(attention_BSD) if self.swin else attention_BSD)

    def _normed(self, h_BSD: Tensor) -> Tensor:
        """The experts' input."""
        return h_BSD if self.swin else self.experts_norm(h_BSD)

    def _add_experts(self, residual_BSD: Tensor, experts_BSD: Tensor) -> Tensor:
        """Add the residual branch of the experts, given their output."""
        experts_BSD = self.experts_norm(experts_BSD) if self.swin else experts_BSD
        return residual_BSD + self.dropout(experts_BSD)


class DepthLayer(DecoderLayer):
    """A layer with mixture-of-depths (§2.3, Equation 2).

    Tokens that are not selected are left unchanged.

    Args:
        config, vocabulary, shares, dispatch: as for `Transformer`.
        depth: see `DepthConfig`.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        shares: Sequence[float],
        dispatch: Dispatch,
        depth: DepthConfig,
    ):
        layer_shares, token_fraction = depth.layer_shares(shares, vocabulary.modalities)
        super().__init__(config, vocabulary, layer_shares, dispatch, token_fraction)
        self.dispatch = dispatch
        self.depth = DepthRouter(config.dim, depth, shares, vocabulary.modalities)

    def before_experts(
        self, x_BSD: Tensor, context: LayerContext, routing: Routing
    ) -> BeforeExperts:
        """Select tokens and compute what precedes the experts."""
        segments = context.segments.id_RS if isinstance(context, TokenContext) else None
        selection, diagnostics = self.depth(x_BSD, context.modality_BS, routing, segments)
        x_ND, index_RK = x_BSD.flatten(0, 1), selection.index_EK
        selected = context.select(index_RK, selection.filled_EK)
        group_tokens = self.experts.find_tokens(selected.modality_BS, routing)
        if not index_RK.shape[1]:  # only under policies without a capacity
            # The experts run on empty input, too: FSDP gathers their weights on all ranks together.
            none_R0D = x_BSD[:, :0]
            return BeforeExperts(
                none_R0D,
                none_R0D,
                selected.modality_BS,
                group_tokens,
                selection,
                None,
                diagnostics,
            )
        index_T, filled_T = index_RK.flatten(), selection.filled_EK.flatten()
        slots = self.dispatch(index_T, filled_T, torch.zeros_like(index_T), len(x_ND), 1)
        x_RKD = slots.gather(x_ND).unflatten(0, index_RK.shape)
        attention_RKD = self._attend(x_RKD, selected)
        # The residual is without x: the update, attention + experts, is multiplied by the score
        # before it is added to x (Equation 2).
        return BeforeExperts(
            self._normed(x_RKD + attention_RKD),
            attention_RKD,
            selected.modality_BS,
            group_tokens,
            selection,
            slots,
            diagnostics,
        )

    def after_experts(
        self,
        x_BSD: Tensor,
        given: BeforeExperts,
        experts_BSD: Tensor,
        diagnostics: list[Diagnostics],
        routing: Routing,
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Add the update of the selected tokens, multiplied by their scores, to them."""
        assert given.selection is not None and given.depth is not None
        y_ND = x_BSD.flatten(0, 1)
        if given.slots is not None:
            update_RKD = self._add_experts(given.residual_BSD, experts_BSD)
            update_RKD = update_RKD * given.selection.weight_EK[..., None]
            y_ND = given.slots.scatter_add(y_ND, update_RKD.flatten(0, 1).to(y_ND.dtype))
        of_experts = _scattered(diagnostics, given.selection.index_EK.flatten(), len(y_ND))
        of_routers = [*of_experts, given.depth]
        return y_ND.view_as(x_BSD), [_check(y_ND, of_routers, routing), *of_routers]


def _scattered(
    diagnostics: Sequence[Diagnostics], index_T: Tensor, tokens: int
) -> list[Diagnostics]:
    """The diagnostics of the experts, with records of all tokens instead of the selected ones."""
    return [
        Diagnostics(
            nonfinite=each.nonfinite,
            record=each.record and each.record.scatter(index_T, tokens),
            cutoff_E=each.cutoff_E,
            load_O=each.load_O,
            loss=each.loss,
        )
        for each in diagnostics
    ]


def _check(y_BSD: Tensor, of_routers: Sequence[Diagnostics], routing: Routing) -> Diagnostics:
    """Flag a non-finite output: one such value makes the sum non-finite, in a single pass."""
    if not routing.checks:
        return Diagnostics(None)
    flags = [each.nonfinite for each in of_routers if each.nonfinite is not None]
    return Diagnostics(torch.stack([~y_BSD.detach().sum().isfinite(), *flags]).any())


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
