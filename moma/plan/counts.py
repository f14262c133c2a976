"""What a recipe will cost: parameters and operations by part, before anything is allocated."""

from typing import Any

from moma.model import flops
from moma.train.recipe import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Count what a recipe trains in its stage `pretrain`.

    Returns:
        `parameters`, `active_parameters`, `flops_per_token` (forward + backward), each with its
        `parts`, and these by kind of layer, `parts_by_layer`; `auxiliary_parameters`, which are
        trained afterwards and belong to no total; `empty_slot_flops_per_token`, spent on slots
        without a token; `layers`, those without and with a gate; `tokens_per_step` of one rank.
    """
    config, vocabulary_size = recipe.model, recipe.text_tokenizer.vocabulary_size
    micro_batch_size, sequence_length = recipe.data.micro_batch_size, recipe.data.sequence_length
    tokens = micro_batch_size * sequence_length
    forward = flops.forward_by_kind(
        config, vocabulary_size, recipe.shares, micro_batch_size, sequence_length
    )
    empty = flops.empty_slot_flops(config, recipe.shares, micro_batch_size, sequence_length)
    counts = {
        "parameters": flops.parameters_by_kind(config, vocabulary_size),
        "active_parameters": flops.active_by_kind(config, vocabulary_size, recipe.shares),
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
