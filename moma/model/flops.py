"""Parameters and floating-point operations, counted from the configuration alone.

The one place that counts: the trainer, plans and every comparison ask here. A multiply-add is two
operations; attention counts the full products of queries and keys, masked or not, as
`torch.utils.flop_counter` does; elementwise work is left out. Backward costs twice the forward.

Under static capacity some slots of mixture-of-depths stay empty; they are counted apart, by
`empty_slot_flops`, and belong to no other count.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moma.model.architecture import ModelConfig
from moma.model.experts import GroupConfig, group_share, max_groups_per_modality
from moma.model.routing import static_capacity
from moma.vocabulary import MODALITIES

Counts = dict[str, float]
# Of layers without a gate (`full`), of those with one (`gated`), and of what is `outside` layers.
CountsByKind = dict[str, Counts]

_PARTS = ("embedding", "attention", "norms", "experts", "routers", "depth", "head")


class LayerKind(NamedTuple):
    """Layers that are alike, and what reaches them of micro_batch_size × sequence_length tokens.

    Attributes:
        layers: how many there are.
        token_fraction: part of the tokens that attention and experts meet: 1, or what a gate lets
        through.
        tokens: that many of them.
        pairs: of queries and keys in the attention products.
    """

    layers: int
    token_fraction: float
    tokens: int
    pairs: int


def layer_kinds(
    config: ModelConfig, micro_batch_size: int, sequence_length: int
) -> list[LayerKind]:
    """The layers without and those with a gate, which may be none."""
    gated, tokens = len(config.depth_layers), micro_batch_size * sequence_length
    kinds = [LayerKind(config.layers - gated, 1.0, tokens, tokens * sequence_length)]
    depth = config.depth_config
    if depth is None:
        return kinds
    if depth.scope == "sequence":
        chosen = static_capacity(depth.capacity_factor, sequence_length)
        return [
            *kinds,
            LayerKind(
                gated,
                depth.capacity_factor,
                micro_batch_size * chosen,
                micro_batch_size * chosen**2,
            ),
        ]
    chosen = static_capacity(depth.capacity_factor, tokens)
    # One sequence of all that are chosen; a long one is cut into windows, see `AttentionMask`.
    windows = -(-chosen // sequence_length)
    pairs = (
        chosen**2
        if chosen <= 2 * sequence_length
        else windows * sequence_length * 2 * sequence_length
    )
    return [*kinds, LayerKind(gated, depth.capacity_factor, chosen, pairs)]


def sum_over_kinds(by_kind: Mapping[str, Counts]) -> Counts:
    """Counts of layers of every kind, and of what is outside them, added up part by part."""
    counts = by_kind.values()
    found = [part for part in _PARTS if any(part in each for each in counts)]
    return {part: sum(each.get(part, 0) for each in counts) for part in found}


def parameters(config: ModelConfig, vocabulary_size: int) -> Counts:
    """Number of parameters by kind of part, the auxiliary routers' left out.

    Returns:
        `embedding`, `attention` with its norms of queries and keys, `norms`, `experts`, `routers`
        of experts, `depth` (the gates), `head`.
    """
    return sum_over_kinds(parameters_by_kind(config, vocabulary_size))


def parameters_by_kind(config: ModelConfig, vocabulary_size: int) -> CountsByKind:
    """The same by kind of layer, as in `CountsByKind`."""
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
    """Number of parameters of the auxiliary routers, which are trained afterwards."""
    half = config.dim // 2
    experts = sum(half * (config.dim + group.experts) for group in _routed(config))
    return config.layers * experts + len(config.depth_layers) * half * (config.dim + 1)


def active_parameters(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
) -> Counts:
    """Number of parameters that a token meets on average, by kind of part as in `parameters`.

    One expert of each group of its modality; of a layer with a gate, the part of the tokens that
    it lets through. Embedding table and head count whole.
    """
    return sum_over_kinds(active_by_kind(config, vocabulary_size, shares, modalities))


def active_by_kind(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
) -> CountsByKind:
    """The same by kind of layer, as in `CountsByKind`."""
    whole, expert = _layer_parameters(config), 3 * config.dim * config.hidden_width
    layer = whole | {
        "experts": sum(group_share(g, shares, modalities) * expert for g in config.group_list),
        "routers": sum(
            group_share(g, shares, modalities) * config.dim * g.experts for g in _routed(config)
        ),
    }
    depth, gated = config.depth_config, len(config.depth_layers)
    met = depth.capacity_factor * gated if depth else 0
    return {
        "full": _times(config.layers - gated, layer),
        "gated": _times(met, layer) | {"depth": gated * config.dim},
        "outside": parameters_by_kind(config, vocabulary_size)["outside"],
    }


def forward_flops(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    micro_batch_size: int,
    sequence_length: int,
    modalities: Sequence[str] = MODALITIES,
) -> Counts:
    """Operations of one forward pass over a micro-batch under batch choice.

    Returns:
        Operations by kind of part: `attention`, `routers`, `experts`, `depth`, `head`.
    """
    return sum_over_kinds(
        forward_by_kind(
            config, vocabulary_size, shares, micro_batch_size, sequence_length, modalities
        )
    )


def forward_by_kind(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    micro_batch_size: int,
    sequence_length: int,
    modalities: Sequence[str] = MODALITIES,
) -> CountsByKind:
    """The same by kind of layer, as in `CountsByKind`."""
    tokens = micro_batch_size * sequence_length

    def inside(kind: LayerKind) -> Counts:
        projections = 4 * config.dim * (config.dim + _key_width(config))
        slots = sum(_slots(each, kind, shares, modalities)[0] for each in config.group_list)
        scores = sum(each.experts for each in _routed(config))
        layer = {
            "attention": kind.tokens * projections + 4 * kind.pairs * config.dim,
            "routers": 2 * kind.tokens * config.dim * scores,
            "experts": 6 * slots * config.dim * config.hidden_width,
        }
        return _times(kind.layers, layer)

    full, *gated = (inside(kind) for kind in layer_kinds(config, micro_batch_size, sequence_length))
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
    """Operations of one forward pass on slots that hold no token, under static capacity.

    A lone expert behind a gate has room for every token of its modality that may come through,
    and cannot know beforehand how many will. Run as one grouped product, lone experts share room.
    """
    lone = [group for group in config.group_list if group.experts == 1]
    overlap = max_groups_per_modality(group.modalities for group in lone)
    empty = 0.0
    for kind in layer_kinds(config, micro_batch_size, sequence_length):
        slots = [_slots(group, kind, shares, modalities) for group in lone]
        held, room = (sum(each) for each in zip(*slots, strict=True)) if slots else (0, 0)
        if config.implementation == "grouped":
            room = min(room, overlap * kind.tokens)
        empty += kind.layers * 6 * (room - held) * config.dim * config.hidden_width
    return empty


def training_flops_per_token(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    micro_batch_size: int,
    sequence_length: int,
) -> float:
    """Operations of forward and backward for one token of a micro-batch."""
    parts = forward_flops(config, vocabulary_size, shares, micro_batch_size, sequence_length)
    return 3 * sum(parts.values()) / (micro_batch_size * sequence_length)


def router_stage_flops_per_token(
    config: ModelConfig,
    vocabulary_size: int,
    shares: Sequence[float],
    micro_batch_size: int,
    sequence_length: int,
) -> float:
    """Operations of the auxiliary routers' stage: the frozen model runs forward alone."""
    tokens = micro_batch_size * sequence_length
    total = sum(
        forward_flops(config, vocabulary_size, shares, micro_batch_size, sequence_length).values()
    )
    half = config.dim // 2

    def auxiliary(choices: int) -> int:
        # Forward and backward of two layers, but no gradient of what the first of them reads.
        return 2 * half * (2 * config.dim + 3 * choices)

    for kind in layer_kinds(config, micro_batch_size, sequence_length):
        experts = sum(auxiliary(group.experts) for group in _routed(config))
        total += kind.layers * kind.tokens * experts
    return total / tokens + len(config.depth_layers) * auxiliary(1)


def _routed(config: ModelConfig) -> list[GroupConfig]:
    return [group for group in config.group_list if group.experts > 1]


def _key_width(config: ModelConfig) -> int:
    """Width of all heads of keys, or of values, together."""
    return config.dim // config.heads * config.key_heads


def _layer_parameters(config: ModelConfig) -> Counts:
    norms = 2 * (config.dim + _key_width(config)) if config.query_key_norm else 0
    expert = 3 * config.dim * config.hidden_width
    return {
        "attention": 2 * config.dim * (config.dim + _key_width(config)) + norms,
        "experts": sum(group.experts for group in config.group_list) * expert,
        "routers": sum(group.experts for group in _routed(config)) * config.dim,
        "norms": 2 * config.dim,
    }


def _times(layers: float, counts: Mapping[str, float]) -> Counts:
    return {part: layers * count for part, count in counts.items()}


def _slots(
    group: GroupConfig, kind: LayerKind, shares: Sequence[float], modalities: Sequence[str]
) -> tuple[float, int]:
    """Slots of a group that hold a token, and all that it has under static capacity."""
    share = group_share(group, shares, modalities, kind.token_fraction)
    room = group.experts * static_capacity(share, kind.tokens, group.experts)
    if group.experts > 1 or kind.token_fraction == 1:
        return room, room
    return group_share(group, shares, modalities) * kind.tokens, room
