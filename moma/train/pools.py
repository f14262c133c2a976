"""Pools: the tokens of a micro-batch on one rank that compete for slots under expert choice.

Routers trained with few competing tokens lose accuracy when they are used causally: 0.036 nats with
2,048 tokens, nothing from 8,192 on (arXiv 2603.11535, Table 1).
"""

import logging

from moma.model.groups import group_share
from moma.train.recipe import Recipe

logger = logging.getLogger(__name__)

ENOUGH = 8192


def pool_sizes(recipe: Recipe) -> dict[str, int]:
    """Number of tokens of each pool, by the recipe's shares; the smallest of all layers."""
    model, depth = recipe.model, recipe.model.depth_config
    tokens = recipe.data.micro_batch_size * recipe.data.sequence_length
    shares, fraction, pools = recipe.shares, 1.0, {}
    if depth is not None and model.depth_layers:
        fraction = depth.token_fraction(recipe.shares)
        shares = tuple(depth.layer_shares(recipe.shares)[0])
    if model.token_choice_config is None:
        pools = {
            f"experts of {' and '.join(group.modalities)}": round(
                group_share(group, shares) * fraction * tokens
            )
            for group in model.group_list
            if group.experts > 1
        }
    if depth is not None and model.depth_layers:
        by_sequence = depth.scope == "sequence"
        own = recipe.data.sequence_length if by_sequence else tokens
        smallest = 1.0 if depth.modality_factors is None else min(recipe.shares)
        pools["depth routers"] = round(smallest * own)
    return pools


def warn_of_small_pools(recipe: Recipe) -> None:
    """Log one line if a pool of a stage that trains with expert choice is small."""
    small = {name: size for name, size in pool_sizes(recipe).items() if size < ENOUGH}
    if not small or recipe.stage == "aux_router":
        return
    named = ", ".join(f"{size:,} for {name}" for name, size in small.items())
    keys = "data.micro_batch_size or data.sequence_length"
    depth = recipe.model.depth_config
    if "depth routers" in small and depth is not None and depth.scope == "sequence":
        keys += ', and set model.depth.scope="batch"'
    logger.warning(
        "%s: few tokens compete in a micro-batch of one rank (%s); with fewer than %s the model "
        "may lose accuracy in generation; raise %s",
        recipe.run,
        named,
        f"{ENOUGH:,}",
        keys,
    )
