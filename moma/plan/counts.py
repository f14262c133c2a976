"""Parameters and operations of a recipe by part, without allocating anything."""

from typing import Any

from moma.model import flops
from moma.train.recipe import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Count the parameters and operations of a recipe's stage `pretrain`.

    Returns:
        `parameters`, `active_parameters` and `flops_per_token` (forward + backward), and each of
        them by part (`parts`) and by kind of layer (`parts_by_layer`); `auxiliary_parameters` and
        `empty_slot_flops_per_token`, which no total includes; `layers` without (`full`) and with
        (`gated`) mixture-of-depths; `tokens_per_step` of one rank.
    """
    config, vocabulary_size = recipe.model, recipe.text_tokenizer.vocabulary_size
    micro_batch_size, sequence_length = recipe.data.micro_batch_size, recipe.data.sequence_length
    tokens = micro_batch_size * sequence_length
    forward = flops.forward_flops(
        config, vocabulary_size, recipe.shares, micro_batch_size, sequence_length
    )
    empty = flops.empty_slot_flops(config, recipe.shares, micro_batch_size, sequence_length)
    counts = {
        "parameters": flops.parameters(config, vocabulary_size),
        "active_parameters": flops.active_parameters(config, vocabulary_size, recipe.shares),
        "flops_per_token": {
            kind: {part: 3 * count / tokens for part, count in parts.items()}
            for kind, parts in forward.items()
        },
    }
    totals = {key: flops.sum_over_kinds(by_kind) for key, by_kind in counts.items()}
    return {
        **{key: round(sum(parts.values())) for key, parts in totals.items()},
        "auxiliary_parameters": flops.auxiliary_parameters(config),
        "empty_slot_flops_per_token": round(3 * empty / tokens),
        "layers": {
            "full": config.layers - len(config.depth_layers),
            "gated": len(config.depth_layers),
        },
        "tokens_per_step": tokens * recipe.pretrain.gradient_accumulation_steps,
        "parts": {key: _rounded(parts) for key, parts in totals.items()},
        "parts_by_layer": {
            key: {kind: _rounded(parts) for kind, parts in by_kind.items()}
            for key, by_kind in counts.items()
        },
    }


def _rounded(parts: flops.Counts) -> dict[str, int]:
    return {part: round(count) for part, count in parts.items()}
