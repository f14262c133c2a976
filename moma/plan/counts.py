"""Parameters and operations of a recipe by part, without allocating anything."""

from typing import Any

from moma.model.flops import Counts, sum_over_kinds
from moma.train.recipe import Recipe
from moma.train.stages import model_counts


def plan(recipe: Recipe) -> dict[str, Any]:
    """Count the parameters and operations of a recipe's stage `pretrain`.

    Returns:
        `parameters`, `active_parameters` and `flops_per_token` (forward + backward), and each of
        them by part (`parts`) and by kind of layer (`parts_by_layer`); `auxiliary_parameters` and
        `empty_slot_flops_per_token`, which no total includes; `layers` without (`full`) and with
        (`mod`) mixture-of-depths; `tokens_per_step` of one rank.
    """
    model = model_counts(recipe, recipe.text_tokenizer.vocabulary_size)
    tokens = recipe.data.micro_batch_size * recipe.data.sequence_length
    counts = {
        "parameters": model.parameters(),
        "active_parameters": model.active_parameters(),
        "flops_per_token": {
            kind: {part: 3 * count / tokens for part, count in parts.items()}
            for kind, parts in model.forward_flops().items()
        },
    }
    totals = {key: sum_over_kinds(by_kind) for key, by_kind in counts.items()}
    return {
        **{key: round(sum(parts.values())) for key, parts in totals.items()},
        "auxiliary_parameters": model.auxiliary_parameters(),
        "empty_slot_flops_per_token": round(3 * model.empty_slot_flops() / tokens),
        "layers": {name: kind.layers for name, kind in model.layer_kinds().items()},
        "tokens_per_step": tokens * recipe.pretrain.gradient_accumulation_steps,
        "parts": {key: _rounded(parts) for key, parts in totals.items()},
        "parts_by_layer": {
            key: {kind: _rounded(parts) for kind, parts in by_kind.items()}
            for key, by_kind in counts.items()
        },
    }


def _rounded(parts: Counts) -> dict[str, int]:
    return {part: round(count) for part, count in parts.items()}
