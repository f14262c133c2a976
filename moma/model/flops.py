"""Parameters and floating-point operations, computed from the configuration.

The only place that counts them; the trainer, plans and comparisons use it. A multiply-add is two
operations. Attention counts the full products of queries and keys, masked or not, like
`torch.utils.flop_counter`. Elementwise operations are not counted. The backward pass costs twice
the forward pass.

Under static capacity with mixture-of-depths, some slots of single-expert groups are empty. Only
`empty_slot_flops` counts them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moma.model.architecture import ModelConfig
from moma.model.experts import GroupConfig, group_share, max_groups_per_modality
from moma.model.routing import static_capacity
from moma.vocabulary import MODALITIES

Counts = dict[str, float]
# Counts of the layers without (`full`) and with (`gated`) mixture-of-depths, and of the parts
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
    """

    layers: int
    token_fraction: float
    tokens: int
    pairs: int


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


def layer_kinds(
    config: ModelConfig, micro_batch_size: int, sequence_length: int
) -> list[LayerKind]:
    """Return the layers without mixture-of-depths and, if it is used, those with it."""
    gated, tokens = len(config.depth_layers), micro_batch_size * sequence_length
    kinds = [LayerKind(config.layers - gated, 1.0, tokens, tokens * sequence_length)]
    depth = config.depth_config
    if depth is None:
        return kinds
    if depth.scope == "sequence":
        selected = static_capacity(depth.capacity_factor, sequence_length)
        pairs, selected = micro_batch_size * selected**2, micro_batch_size * selected
    else:
        selected = static_capacity(depth.capacity_factor, tokens)
        # All selected tokens form one sequence; a long one is split into windows (`AttentionMask`).
        windows = -(-selected // sequence_length)
        is_long = selected > 2 * sequence_length
        pairs = windows * 2 * sequence_length**2 if is_long else selected**2
    return [*kinds, LayerKind(gated, depth.capacity_factor, selected, pairs)]


def expert_slots(
    config: ModelConfig,
    kind: LayerKind,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
) -> ExpertSlots:
    """Return the slots that one layer allocates; `grouped` limits those of single experts."""
    routed = single = dense = 0
    for group in config.group_list:
        share = group_share(group, shares, modalities, kind.token_fraction)
        slots = group.experts * static_capacity(share, kind.tokens, group.experts)
        if group.experts > 1:
            routed += slots
        elif len(group.modalities) == len(modalities):
            dense += slots
        else:
            single += slots
    if config.implementation == "grouped":
        groups = _single_expert_groups(config, modalities)
        overlap = max_groups_per_modality(group.modalities for group in groups)
        single = min(single, overlap * kind.tokens)
    return ExpertSlots(routed, single, dense)


def sum_over_kinds(by_kind: Mapping[str, Counts]) -> Counts:
    """Sum counts over the kinds of layers and the parts outside, part by part."""
    counts = by_kind.values()
    found = [part for part in _PARTS if any(part in each for each in counts)]
    return {part: sum(each.get(part, 0) for each in counts) for part in found}


def parameters(config: ModelConfig, vocabulary_size: int) -> CountsByKind:
    """Count the parameters, without those of auxiliary routers.

    Returns:
        By kind of layer: `embedding`, `attention` with its norms of queries and keys, `norms`,
        `experts`, `routers` (of experts), `depth` (depth routers), `head`.
    """
    layer, gated = _layer_parameters(config), len(config.depth_layers)
    return {
        "full": _times(config.layers - gated, layer),
        "gated": _times(gated, layer | {"depth": config.dim}),
        "outside": {
            "embedding": vocabulary_size * config.dim,
            "norms": config.dim,
            "head": 0 if config.tied_embeddings else vocabulary_size * config.dim,
        },
    }


def auxiliary_parameters(config: ModelConfig) -> int:
    """Count the parameters of the auxiliary routers."""
    half = config.dim // 2
    experts = sum(half * (config.dim + group.experts) for group in _routed_groups(config))
    return config.layers * experts + len(config.depth_layers) * half * (config.dim + 1)


def active_parameters(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
) -> CountsByKind:
    """Count the parameters that a token uses on average, by kind of layer and part.

    That is one expert of each group of the token's modality and, with mixture-of-depths, the
    capacity factor times a layer's. The embedding table and the head count in full.
    """
    layer, expert = _layer_parameters(config), 3 * config.dim * config.hidden_width
    layer |= {
        "experts": sum(group_share(g, shares, modalities) * expert for g in config.group_list),
        "routers": sum(
            group_share(g, shares, modalities) * config.dim * g.experts
            for g in _routed_groups(config)
        ),
    }
    depth, gated = config.depth_config, len(config.depth_layers)
    used = depth.capacity_factor * gated if depth else 0
    return {
        "full": _times(config.layers - gated, layer),
        "gated": _times(used, layer) | {"depth": gated * config.dim},
        "outside": parameters(config, vocabulary_size)["outside"],
    }


def forward_flops(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    micro_batch_size: int,
    sequence_length: int,
    modalities: Sequence[str] = MODALITIES,
) -> CountsByKind:
    """Count the operations of one forward pass over a micro-batch under batch choice.

    Returns:
        By kind of layer: `attention`, `routers`, `experts`, `depth`, `head`.
    """
    tokens = micro_batch_size * sequence_length

    def layer_flops(kind: LayerKind) -> Counts:
        projections = 4 * config.dim * (config.dim + _key_width(config))
        filled = sum(_filled_slots(g, kind, shares, modalities) for g in config.group_list)
        routed_experts = sum(group.experts for group in _routed_groups(config))
        layer = {
            "attention": kind.tokens * projections + 4 * kind.pairs * config.dim,
            "routers": 2 * kind.tokens * config.dim * routed_experts,
            "experts": 6 * filled * config.dim * config.hidden_width,
        }
        return _times(kind.layers, layer)

    full, *gated = map(layer_flops, layer_kinds(config, micro_batch_size, sequence_length))
    return {
        "full": full,
        "gated": {
            **(gated[0] if gated else dict.fromkeys(full, 0.0)),
            "depth": len(config.depth_layers) * 2 * tokens * config.dim,
        },
        "outside": {"head": 2 * tokens * config.dim * vocabulary_size},
    }


def empty_slot_flops(
    config: ModelConfig,
    shares: Sequence[float],
    micro_batch_size: int,
    sequence_length: int,
    modalities: Sequence[str] = MODALITIES,
) -> float:
    """Count the operations of one forward pass on empty slots, under static capacity.

    With mixture-of-depths, a single-expert group has a slot for every token that could be of its
    modality. The `grouped` implementation shares these slots among such groups.
    """
    empty = 0.0
    for kind in layer_kinds(config, micro_batch_size, sequence_length):
        groups = _single_expert_groups(config, modalities)
        filled = sum(_filled_slots(group, kind, shares, modalities) for group in groups)
        allocated = expert_slots(config, kind, shares, modalities).single
        empty += kind.layers * 6 * (allocated - filled) * config.dim * config.hidden_width
    return empty


def training_flops_per_token(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    micro_batch_size: int,
    sequence_length: int,
) -> float:
    """Count the operations of forward and backward per token of a micro-batch."""
    flops = forward_flops(config, vocabulary_size, shares, micro_batch_size, sequence_length)
    return 3 * sum(sum_over_kinds(flops).values()) / (micro_batch_size * sequence_length)


def router_stage_flops_per_token(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    micro_batch_size: int,
    sequence_length: int,
) -> float:
    """Count the operations of training auxiliary routers: the frozen model only runs forward."""
    tokens, half = micro_batch_size * sequence_length, config.dim // 2
    flops = forward_flops(config, vocabulary_size, shares, micro_batch_size, sequence_length)
    total = sum(sum_over_kinds(flops).values())

    def auxiliary(choices: int) -> int:
        # Forward and backward of two linear layers, without the gradient of the first one's input.
        return 2 * half * (2 * config.dim + 3 * choices)

    for kind in layer_kinds(config, micro_batch_size, sequence_length):
        experts = sum(auxiliary(group.experts) for group in _routed_groups(config))
        total += kind.layers * kind.tokens * experts
    return total / tokens + len(config.depth_layers) * auxiliary(1)


def _routed_groups(config: ModelConfig) -> list[GroupConfig]:
    return [group for group in config.group_list if group.experts > 1]


def _single_expert_groups(config: ModelConfig, modalities: Sequence[str]) -> list[GroupConfig]:
    """Groups of one expert for some of the modalities."""
    single = [group for group in config.group_list if group.experts == 1]
    return [group for group in single if len(group.modalities) < len(modalities)]


def _filled_slots(
    group: GroupConfig, kind: LayerKind, shares: Sequence[float], modalities: Sequence[str]
) -> float:
    """Expected number of a group's slots that hold a token."""
    share = group_share(group, shares, modalities)
    if group.experts == 1 and kind.token_fraction < 1:
        return share * kind.tokens
    return group.experts * static_capacity(share, kind.tokens, group.experts)


def _key_width(config: ModelConfig) -> int:
    """Total width of the key heads, or of the value heads."""
    return config.dim // config.heads * config.key_heads


def _layer_parameters(config: ModelConfig) -> Counts:
    norms = 2 * (config.dim + _key_width(config)) if config.query_key_norm else 0
    expert = 3 * config.dim * config.hidden_width
    return {
        "attention": 2 * config.dim * (config.dim + _key_width(config)) + norms,
        "experts": sum(group.experts for group in config.group_list) * expert,
        "routers": sum(group.experts for group in _routed_groups(config)) * config.dim,
        "norms": 2 * config.dim,
    }


def _times(layers: float, counts: Mapping[str, float]) -> Counts:
    return {part: layers * count for part, count in counts.items()}
