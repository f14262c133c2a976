"""A layer of the decoder: attention and experts, for all tokens or for those that a gate chooses.

Shapes: see `layers.py`; R sequences of K chosen tokens each, as in `depth.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from moma.model.architecture import ModelConfig
from moma.model.attention import Attention, AttentionMask, selected_mask
from moma.model.auxiliary import Diagnostics
from moma.model.depth import DepthConfig, DepthRouter
from moma.model.experts import build_experts, build_group
from moma.model.layers import gather, scatter_add
from moma.model.routing import Routing, Selection
from moma.vocabulary import Vocabulary


class Context(NamedTuple):
    """What a layer knows of its tokens besides their content.

    Attributes:
        modality_BS: −1 for padding.
        document_BS: what attention must not leave; all alike if it may see the whole row.
        angles: of the rotary embedding, each [B, S, 1, C/2].
        mask: what attention sees.
    """

    modality_BS: Tensor
    document_BS: Tensor
    angles: tuple[Tensor, Tensor]
    mask: AttentionMask

    def at(self, selection: Selection) -> "Context":
        """The same of chosen tokens, [R, K]; what is in an empty slot is padding anyway."""
        token_RK, filled_RK, _ = selection
        sequence_length = self.modality_BS.shape[1]
        document_RK = self.document_BS.flatten()[token_RK]
        cosine, sine = (
            angle.expand(*self.modality_BS.shape, -1, -1).flatten(0, 1)[token_RK]
            for angle in self.angles
        )
        return Context(
            self.modality_BS.flatten()[token_RK],
            document_RK,
            (cosine, sine),
            selected_mask(token_RK // sequence_length, document_RK, filled_RK, sequence_length),
        )


class Layer(nn.Module):
    """Attention and experts, each with its residual.

    Swin: h = x + norm(attention(x)), out = h + norm(experts(h)), so that what nobody took stays as
    it is (Swin v2, arXiv 2111.09883). Pre: the norms stand before attention and experts.

    Args:
        config, vocabulary, shares: as for `Transformer`.
        token_fraction: the part of all tokens that attention and experts meet.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        shares: Sequence[float],
        token_fraction: float = 1.0,
    ):
        super().__init__()
        self.swin = config.norm == "swin"
        self.attention = Attention(
            config.dim, config.heads, config.key_heads, config.query_key_norm
        )
        width, names = config.hidden_width, vocabulary.modalities
        groups = [
            build_group(
                config.dim, width, group, shares, names, token_fraction, config.router_noise
            )
            for group in config.group_list
        ]
        self.experts = build_experts(groups, config.implementation)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.experts_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BSD: Tensor, context: Context, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Map [B, S, D] to [B, S, D]; return a report of the output, and what the routers tell."""
        attended_BSD, fed_BSD, reports = self._updates(x_BSD, context, routing)
        y_BSD = x_BSD + attended_BSD + fed_BSD
        return y_BSD, [_of_output(y_BSD), *reports]

    def _updates(
        self, x_BSD: Tensor, context: Context, routing: Routing
    ) -> tuple[Tensor, Tensor, list[Diagnostics]]:
        """What attention adds to x, and what the experts then add."""
        read_BSD = x_BSD if self.swin else self.attention_norm(x_BSD)
        attended_BSD = self.attention(read_BSD, context.angles, context.mask)
        attended_BSD = self.attention_norm(attended_BSD) if self.swin else attended_BSD
        attended_BSD = self.dropout(attended_BSD)
        h_BSD = x_BSD + attended_BSD
        read_BSD = h_BSD if self.swin else self.experts_norm(h_BSD)
        fed_BSD, reports = self.experts(read_BSD, context.modality_BS, routing)
        fed_BSD = self.experts_norm(fed_BSD) if self.swin else fed_BSD
        return attended_BSD, self.dropout(fed_BSD), reports


class DepthLayer(Layer):
    """A layer that a gate opens to some tokens; the others keep what they are (§2.3)."""

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        shares: Sequence[float],
        depth: DepthConfig,
    ):
        super().__init__(config, vocabulary, shares, token_fraction=depth.capacity_factor)
        self.depth = DepthRouter(config.dim, depth)

    def forward(
        self, x_BSD: Tensor, context: Context, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Map [B, S, D] to [B, S, D]; the gate's report comes after those of the experts."""
        selection, gate = self.depth(x_BSD, context.modality_BS >= 0, routing)
        x_ND, token_RK = x_BSD.flatten(0, 1), selection.token_EK
        x_RKD = gather(x_ND, token_RK.flatten()).unflatten(0, token_RK.shape)
        attended_RKD, fed_RKD, reports = self._updates(x_RKD, context.at(selection), routing)
        update_RKD = (attended_RKD + fed_RKD) * selection.score_EK[..., None]
        update_TD = update_RKD.flatten(0, 1).to(x_ND.dtype)
        y_ND = scatter_add(x_ND, token_RK.flatten(), update_TD)
        over_all = [
            report._replace(record=report.record.spread(token_RK.flatten(), len(x_ND)))
            if report.record is not None
            else report
            for report in reports
        ]
        return y_ND.view_as(x_BSD), [_of_output(y_ND), *over_all, gate]


def _of_output(y_BSD: Tensor) -> Diagnostics:
    """Whether a layer's output is not finite: nor is its sum then, and one pass finds it."""
    return Diagnostics(~y_BSD.detach().sum().isfinite(), None)


def build_layer(
    number: int, config: ModelConfig, vocabulary: Vocabulary, shares: Sequence[float]
) -> Layer:
    """Layer `number` of a model: with a gate where mixture-of-depths has one."""
    depth = config.depth_config
    if depth is not None and number in config.depth_layers:
        return DepthLayer(config, vocabulary, shares, depth)
    return Layer(config, vocabulary, shares)
