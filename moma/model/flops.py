"""Parameters and floating-point operations, computed from the configuration.

The only place that counts them; the trainer, plans and comparisons use it. A multiply-add is two
operations. Attention counts the full products of queries and keys, masked or not, like
`torch.utils.flop_counter`. Elementwise operations are not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moma.model.architecture import ModelConfig
from moma.model.groups import (
    GroupConfig,
    group_capacity_share,
    group_share,
    max_groups_per_modality,
)
from moma.model.routing import static_capacity
from moma.vocabulary import MODALITIES

Counts = dict[str, float]
# Counts of the layers without (`full`) and with (`mod`) mixture-of-depths, and of the parts
# `outside` the layers.
CountsByKind = dict[str, Counts]

_PARTS = ("embedding", "attention", "norms", "experts", "routers", "depth", "head")


class LayerKind(NamedTuple):
    """Layers of the same kind, and the tokens of a micro-batch that they process.

    Attributes:
        layers: number of layers.
        token_fraction: fraction of the tokens that attention and experts process: 1, or the
            capacity factor of mixture-of-depths.
        tokens: number of those tokens.
        pairs: number of query-key pairs in attention.
        shares: fraction of each modality among these tokens.
        share_fraction: `token_fraction` of `group_capacity_share`.
    """

    layers: int
    token_fraction: float
    tokens: int
    pairs: int
    shares: Sequence[float]
    share_fraction: float = 1.0


class ExpertSlots(NamedTuple):
    """Slots of a layer's experts under static capacity, whether they hold a token or not.

    Attributes:
        routed: of groups with a router.
        single: of groups of one expert for some of the modalities.
        dense: of groups of one expert for all modalities.
    """

    routed: int
    single: int
    dense: int


@dataclass(frozen=True)
class ModelCounts:
    """Parameters of a model, and its operations on a micro-batch under expert choice.

    The parts are `embedding`, `attention` (with its norms of queries and keys), `norms`, `experts`,
    `routers` (of experts), `depth` (depth routers) and `head`.

    Attributes:
        vocabulary_size: V.
        shares: fraction of each modality among the tokens.
        micro_batch_size: number of sequences B of a micro-batch.
        sequence_length: S.
    """

    config: ModelConfig
    vocabulary_size: int
    shares: Sequence[float]
    micro_batch_size: int
    sequence_length: int

    def parameters(self) -> CountsByKind:
        """Count the parameters by kind of layer and part, without those of auxiliary routers."""
        config, layer = self.config, self._layer_parameters()
        table, num_mod = self.vocabulary_size * config.dim, len(config.depth_layers)
        head = 0 if config.tied_embeddings else table
        return {
            "full": _times(config.layers - num_mod, layer),
            "mod": _times(num_mod, layer | {"depth": config.dim}),
            "outside": {"embedding": table, "norms": config.dim, "head": head},
        }

    def auxiliary_parameters(self) -> int:
        """Count the parameters of the auxiliary routers."""
        config, half = self.config, self.config.dim // 2
        experts = sum(half * (config.dim + group.experts) for group in self._predicted_groups)
        return config.layers * experts + len(config.depth_layers) * half * (config.dim + 1)

    def active_parameters(self, tokens: int = 1) -> CountsByKind:
        """Count the parameters that `tokens` tokens use on average, by kind of layer and part.

        A token uses an expert of a group of its modality with probability 1/E, under token choice
        with that of a balanced load, and, with mixture-of-depths, a layer with the capacity factor
        as probability. The embedding table and the head count in full.
        """
        config, depth = self.config, self.config.depth_config
        num_mod = len(config.depth_layers)
        fraction = depth.token_fraction(self.shares) if depth else 0.0
        shares = depth.layer_shares(self.shares)[0] if depth else self.shares
        full = self._active_layer_parameters(1.0, self.shares, tokens)
        full = _times(config.layers - num_mod, full)
        layer = _times(num_mod, self._active_layer_parameters(fraction, shares, tokens))
        return {
            "full": full,
            "mod": layer | {"depth": num_mod * config.dim},
            "outside": self.parameters()["outside"],
        }

    def _active_layer_parameters(
        self, fraction: float, shares: Sequence[float], tokens: int
    ) -> Counts:
        """Count for a layer that processes a fraction of the tokens, of these modalities."""

        def used(share: float) -> float:
            return 1 - (1 - fraction * share) ** tokens

        groups = self.config.group_list
        experts = sum(
            group.experts
            * used(group_share(group, shares) * self._per_token(group) / group.experts)
            for group in groups
        )
        routers = sum(self._outputs(group) * used(group_share(group, shares)) for group in groups)
        return _times(used(1.0), self._layer_parameters()) | {
            "experts": experts * self._expert_parameters,
            "routers": routers * self.config.dim,
        }

    def forward_flops(self) -> CountsByKind:
        """Count the operations of a forward pass by kind of layer and part.

        Those on empty slots are left out; see `empty_slot_flops`.
        """
        config = self.config
        flops = {name: self._layer_flops(kind) for name, kind in self.layer_kinds().items()}
        flops["mod"]["depth"] = len(config.depth_layers) * 2 * self._tokens * config.dim
        head = 2 * self._tokens * config.dim * self.vocabulary_size
        return {**flops, "outside": {"head": head}}

    def empty_slot_flops(self) -> float:
        """Count the operations of a forward pass on empty slots, under static capacity.

        With mixture-of-depths, a single-expert group has a slot for every token that could be of
        its modality. The `grouped` implementation shares these slots among such groups. Under token
        choice there are more slots than a balanced load fills; see `TokenChoiceConfig`.
        """
        empty = 0.0
        for kind in self.layer_kinds().values():
            groups = *self._routed_groups, *self._single_expert_groups
            routed, single, _ = self.expert_slots(kind)
            slots = routed + single - sum(self._filled_slots(group, kind) for group in groups)
            empty += kind.layers * 2 * slots * self._expert_parameters
        return empty

    def training_flops_per_token(self) -> float:
        """Count forward and backward per token; the backward pass costs twice the forward pass."""
        return 3 * sum(sum_over_kinds(self.forward_flops()).values()) / self._tokens

    def router_stage_flops_per_token(self) -> float:
        """Count per token for training auxiliary routers.

        The frozen model only runs forward, without its head.
        """
        forward = sum_over_kinds({**self.forward_flops(), "outside": {}})
        return sum(forward.values()) / self._tokens + self.auxiliary_flops_per_token()

    def auxiliary_flops_per_token(self) -> float:
        """Count forward and backward of the auxiliary routers per token of the micro-batch."""
        half = self.config.dim // 2

        def auxiliary(outputs: int) -> int:
            # Forward and backward of two linear layers, without the gradient of the first's input.
            return 2 * half * (2 * self.config.dim + 3 * outputs)

        experts = sum(auxiliary(group.experts) for group in self._predicted_groups)
        tokens = sum(kind.layers * kind.tokens for kind in self.layer_kinds().values())
        return tokens * experts / self._tokens + len(self.config.depth_layers) * auxiliary(1)

    def layer_kinds(self) -> dict[str, LayerKind]:
        """Return the layers without (`full`) and with (`mod`) mixture-of-depths."""
        sequences, length, tokens = self.micro_batch_size, self.sequence_length, self._tokens
        depth, num_mod = self.config.depth_config, len(self.config.depth_layers)
        full = LayerKind(self.config.layers - num_mod, 1.0, tokens, tokens * length, self.shares)
        if depth is None:
            return {"full": full, "mod": full._replace(layers=0, tokens=0, pairs=0)}
        if depth.scope == "sequence":
            selected = sequences * static_capacity(depth.capacity_factor, length)
        elif depth.modality_factors is None:
            selected = static_capacity(depth.capacity_factor, tokens)
        else:
            parts = zip(depth.factors(), self.shares, strict=True)
            selected = sum(static_capacity(factor * share, tokens) for factor, share in parts)
            selected = min(selected, tokens)  # each is rounded up
        # Selected tokens attend within their own sequence, of which there is an equal part each.
        pairs = round(selected**2 / sequences)
        fraction = depth.token_fraction(self.shares)
        own = depth.layer_shares(self.shares)
        return {"full": full, "mod": LayerKind(num_mod, fraction, selected, pairs, *own)}

    def expert_slots(self, kind: LayerKind) -> ExpertSlots:
        """Return the slots that one layer allocates; `grouped` limits those of single experts."""
        routed = single = dense = 0
        for group in self.config.group_list:
            share = group_capacity_share(
                group,
                kind.shares,
                token_fraction=kind.share_fraction,
                token_choice=self.config.token_choice_config,
            )
            slots = group.experts * static_capacity(share, kind.tokens, group.experts)
            if group.experts > 1:
                routed += slots
            elif group in self._single_expert_groups:
                single += slots
            else:
                dense += slots
        if self.config.implementation == "grouped":
            groups = self._single_expert_groups
            overlap = max_groups_per_modality(group.modalities for group in groups)
            single = min(single, overlap * kind.tokens)
        return ExpertSlots(routed, single, dense)

    @property
    def key_width(self) -> int:
        """Total width of the key heads, or of the value heads."""
        return self.config.dim // self.config.heads * self.config.key_heads

    @property
    def _tokens(self) -> int:
        return self.micro_batch_size * self.sequence_length

    @property
    def _expert_parameters(self) -> int:
        """Parameters of one expert; half the operations on one token."""
        return 3 * self.config.dim * self.config.hidden_width

    @property
    def _routed_groups(self) -> list[GroupConfig]:
        return [group for group in self.config.group_list if group.experts > 1]

    @property
    def _predicted_groups(self) -> list[GroupConfig]:
        """Groups with an auxiliary router."""
        return [] if self.config.token_choice_config else self._routed_groups

    @property
    def _single_expert_groups(self) -> list[GroupConfig]:
        """Groups of one expert for some of the modalities."""
        single = [group for group in self.config.group_list if group.experts == 1]
        return [group for group in single if len(group.modalities) < len(MODALITIES)]

    def _filled_slots(self, group: GroupConfig, kind: LayerKind) -> float:
        """Expected number of a group's slots that hold a token."""
        share = group_share(group, kind.shares)
        if group.experts == 1 and kind.token_fraction < 1:
            return share * kind.tokens
        if group.experts > 1 and self.config.token_choice_config:
            return share * kind.tokens * self._per_token(group)
        return group.experts * static_capacity(share, kind.tokens, group.experts)

    def _per_token(self, group: GroupConfig) -> float:
        """Mean number of the group's experts that process a token of its modalities."""
        choice = self.config.token_choice_config
        return choice.experts_per_token(group.experts) if choice and group.experts > 1 else 1.0

    def _outputs(self, group: GroupConfig) -> int:
        """Outputs of the group's router; 0 without one."""
        if group.experts == 1:
            return 0
        choice = self.config.token_choice_config
        return choice.router_outputs(group.experts) if choice else group.experts

    def _layer_parameters(self) -> Counts:
        config = self.config
        norms = 2 * (config.dim + self.key_width) if config.query_key_norm else 0
        return {
            "attention": 2 * config.dim * (config.dim + self.key_width) + norms,
            "experts": sum(g.experts for g in config.group_list) * self._expert_parameters,
            "routers": sum(map(self._outputs, config.group_list)) * config.dim,
            "norms": 2 * config.dim,
        }

    def _layer_flops(self, kind: LayerKind) -> Counts:
        """Operations of all layers of a kind."""
        dim = self.config.dim
        projections = 4 * kind.tokens * dim * (dim + self.key_width)
        filled = sum(self._filled_slots(group, kind) for group in self.config.group_list)
        layer = {
            "attention": projections + 4 * kind.pairs * dim,
            "routers": 2 * kind.tokens * dim * sum(map(self._outputs, self.config.group_list)),
            "experts": 2 * filled * self._expert_parameters,
        }
        return _times(kind.layers, layer)


def sum_over_kinds(by_kind: Mapping[str, Counts]) -> Counts:
    """Sum counts over the kinds of layers and the parts outside, part by part."""
    counts = by_kind.values()
    found = [part for part in _PARTS if any(part in each for each in counts)]
    return {part: sum(each.get(part, 0) for each in counts) for part in found}


def _times(layers: float, counts: Mapping[str, float]) -> Counts:
    return {part: layers * count for part, count in counts.items()}
