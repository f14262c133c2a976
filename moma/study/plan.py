"""What a recipe will cost: parameters and operations by part, before anything is allocated."""

from typing import Any

from moma.model import flops
from moma.train.recipe import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Count what a recipe trains in its stage `pretrain`.

    Returns:
        `parameters`, `active_parameters`, `flops_per_token` (forward + backward), each with its
        parts by kind; `auxiliary_parameters`, which are trained afterwards and belong to no total;
        `empty_slot_flops_per_token`, spent on slots without a token; `layers`, those without and
        with a gate; `tokens_per_step` of one rank.
    """
    config, vocabulary_size = recipe.model, recipe.text_tokenizer.vocabulary_size
    rows, row_length = recipe.data.rows, recipe.data.row_length
    tokens = rows * row_length
    forward = flops.forward_flops(config, vocabulary_size, recipe.shares, rows, row_length)
    empty = flops.empty_slot_flops(config, recipe.shares, rows, row_length)
    parts = {
        "parameters": flops.parameters(config, vocabulary_size),
        "active_parameters": flops.active_parameters(config, vocabulary_size, recipe.shares),
        "flops_per_token": {part: 3 * count / tokens for part, count in forward.items()},
    }
    return {
        **{key: round(sum(counts.values())) for key, counts in parts.items()},
        "auxiliary_parameters": flops.auxiliary_parameters(config),
        "empty_slot_flops_per_token": round(3 * empty / tokens),
        "layers": {
            "full": config.layers - len(config.depth_layers),
            "gated": len(config.depth_layers),
        },
        "tokens_per_step": tokens * recipe.pretrain.micro_batches,
        "parts": {
            key: {part: round(count) for part, count in counts.items()}
            for key, counts in parts.items()
        },
    }
