"""Floating-point operations, counted from the configuration alone.

The one place that counts: the trainer, the report and every comparison ask here. A multiply-add is
two operations; attention counts the full S × S products, as `torch.utils.flop_counter` does;
elementwise work is left out. Backward costs twice the forward.
"""

import math
from collections.abc import Sequence

from moma.model.architecture import ModelConfig
from moma.vocabulary import MODALITIES


def forward_flops(
    config: ModelConfig, vocabulary_size: int, shares: Sequence[float], rows: int, row_length: int
) -> dict[str, float]:
    """Operations of one forward pass over rows × row_length tokens under static batch choice.

    Returns:
        Operations by kind of part: `attention`, `routers`, `experts`, `head`.
    """
    tokens = rows * row_length
    attention = 8 * tokens * config.dim**2 + 4 * tokens * row_length * config.dim
    routers = experts = 0
    for group in config.group_list:
        share = sum(shares[MODALITIES.index(name)] for name in group.modalities)
        slots = group.experts * math.ceil(share * tokens / group.experts - 1e-6)
        routers += 2 * tokens * config.dim * group.experts if group.experts > 1 else 0
        experts += 6 * slots * config.dim * config.hidden_width
    return {
        "attention": config.layers * attention,
        "routers": config.layers * routers,
        "experts": config.layers * experts,
        "head": 2 * tokens * config.dim * vocabulary_size,
    }


def training_flops_per_token(
    config: ModelConfig, vocabulary_size: int, shares: Sequence[float], rows: int, row_length: int
) -> float:
    """Operations of forward and backward for one token of a micro-batch."""
    parts = forward_flops(config, vocabulary_size, shares, rows, row_length)
    return 3 * sum(parts.values()) / (rows * row_length)


def router_stage_flops_per_token(
    config: ModelConfig, vocabulary_size: int, shares: Sequence[float], rows: int, row_length: int
) -> float:
    """Operations of the auxiliary routers' stage: the frozen model runs forward alone."""
    parts = forward_flops(config, vocabulary_size, shares, rows, row_length)
    counts = [group.experts for group in config.group_list if group.experts > 1]
    # Forward and backward of two layers, but no gradient of what the first of them reads.
    first, second = config.dim // 2 * config.dim, [config.dim // 2 * count for count in counts]
    auxiliary = 2 * config.layers * (2 * first * len(counts) + 3 * sum(second))
    return sum(parts.values()) / (rows * row_length) + auxiliary
