"""What forward and backward of a micro-batch hold in memory, counted from shapes.

    what each layer keeps + what all layers share + the larger of: the loss, a layer's backward

Counted is what automatic differentiation keeps, in rows of D, F, … numbers for a token. Compiled
layers keep less: what lies between two products is computed again. The counts were read off real
steps; tests hold the sums against the memory of real steps.
"""

from typing import NamedTuple

import torch

from moma.model.architecture import ModelConfig
from moma.model.experts import group_share, max_groups_per_modality
from moma.model.flops import LayerKind, layer_kinds
from moma.model.routing import static_capacity
from moma.train.recipe import Recipe


class _Kept(NamedTuple):
    """Rows that a layer keeps for each token that it computes.

    Attributes:
        width: of D, besides those below.
        keys: as wide as all heads of keys.
        normed: of D and as wide as the keys, more if queries and keys are normalised.
        gated: of D, more behind a gate.
        hidden: of F, for each slot of an expert.
        slot: of D, for each slot of a routed expert, and of one that is alone in its group.
        mask: whether a gated layer's own mask of attention is kept, as numbers.
    """

    width: int
    keys: int
    normed: int
    gated: int
    hidden: int
    slot: tuple[int, int]
    mask: bool


# By whether layers are compiled; and with `recompute = "selective"`, products and choices alone.
_WHOLE = {
    False: _Kept(8, 2, 2, 2, 4, (3, 1), True),
    True: _Kept(6, 2, 1, 1, 3, (3, 1), True),
}
_SELECTED = {
    False: _Kept(8, 2, 0, 1, 2, (1, 1), False),
    True: _Kept(6, 2, 0, 1, 2, (1, 1), False),
}
# Rows of D and of F that exist besides while a layer's gradients are computed.
_WORKING = (2, 1)


def activation_bytes(recipe: Recipe, device: torch.device) -> int:
    """The most bytes besides weights and their gradients that `pretrain` needs at once.

    Args:
        recipe: `engine` tells what is computed in and what is computed again.
        device: decides the precision, if the recipe does not.
    """
    config, data = recipe.model, recipe.data
    tokens, size = (
        data.micro_batch_size * data.sequence_length,
        recipe.engine.compute_dtype(device).itemsize,
    )
    compiled, again = recipe.pretrain.compile, recipe.engine.recompute
    kept, most = 0.0, 0.0
    for kind in layer_kinds(config, data.micro_batch_size, data.sequence_length):
        if not kind.layers:
            continue
        whole = size * _numbers(config, recipe.shares, kind, tokens, _WHOLE[compiled])
        selected = size * _numbers(config, recipe.shares, kind, tokens, _SELECTED[compiled])
        input_alone = size * tokens * config.dim
        left = {"none": whole, "layer": input_alone, "selective": selected}[again]
        kept += kind.layers * left
        wide, hidden = _WORKING
        working = size * kind.tokens * (wide * config.dim + hidden * config.hidden_width)
        most = max(most, whole - left + working)
    shared = _shared(config, tokens, data.sequence_length, size)
    loss = _loss(tokens * recipe.text_tokenizer.vocabulary_size, compiled, size)
    return round(kept + shared + max(most, loss))


def _numbers(
    config: ModelConfig, shares: tuple[float, ...], kind: LayerKind, tokens: int, kept: _Kept
) -> float:
    """Numbers that one layer of a kind keeps, of all `tokens` of the micro-batch."""
    gated = kind.token_fraction < 1
    keys = config.dim // config.heads * config.key_heads
    normed = kept.normed * config.query_key_norm
    token = (kept.width + normed + kept.gated * gated) * config.dim + (kept.keys + normed) * keys
    found = kind.tokens * token + tokens * config.dim * gated  # a gate reads all tokens
    if kept.mask and gated:
        found += kind.pairs
    routed, lone, plain = _slots(config, shares, kind)
    found += (routed + lone + plain) * kept.hidden * config.hidden_width
    if config.implementation == "batched":  # groups' weights are put side by side
        experts = sum(g.experts for g in config.group_list if g.experts > 1)
        found += experts * 3 * config.dim * config.hidden_width
    return found + (routed * kept.slot[0] + lone * kept.slot[1]) * config.dim


def _slots(config: ModelConfig, shares: tuple[float, ...], kind: LayerKind) -> tuple[int, int, int]:
    """Slots of routed experts, of experts alone in their group, of one that takes every token."""
    routed = lone = plain = 0
    alone = [group for group in config.group_list if group.experts == 1]
    for group in config.group_list:
        share = group_share(group, shares, token_fraction=kind.token_fraction)
        room = group.experts * static_capacity(share, kind.tokens, group.experts)
        if group.experts > 1:
            routed += room
        elif len(group.modalities) == len(shares):
            plain += room
        else:
            lone += room
    if config.implementation == "grouped":
        lone = min(lone, max_groups_per_modality(group.modalities for group in alone) * kind.tokens)
    return routed, lone, plain


def _shared(config: ModelConfig, tokens: int, sequence_length: int, size: int) -> int:
    """Bytes of angles and of the mask."""
    mask = tokens * sequence_length * size if config.attention_mask == "document" else 0
    return mask + 4 * tokens * config.dim // config.heads


def _loss(logits: int, compiled: bool, size: int) -> int:
    """Bytes of the logits and of what the loss makes of them; in fp32 unless compiled."""
    if compiled:
        return 3 * logits * size
    return 5 * logits * 4 + (logits * size if size < 4 else 0)
