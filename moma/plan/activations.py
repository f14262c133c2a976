"""Activation memory of forward and backward of a micro-batch, computed from shapes.

    saved by every layer + shared by all layers + the larger of: the loss, one layer's backward

Counted is what autograd saves, as vectors of D, F, … numbers per token. Compiled layers save less,
because elementwise operations between two products are recomputed. The numbers of vectors were
determined by measuring real steps; tests compare the totals with real steps.
"""

from typing import NamedTuple

import torch

from moma.model.attention_kernels import kernel_name
from moma.model.flops import LayerKind, ModelCounts
from moma.train.cross_entropy import chunk_tokens
from moma.train.recipe import Recipe
from moma.train.stages import model_counts


class _Saved(NamedTuple):
    """Number of vectors that a layer saves for backward, per token that it processes.

    Attributes:
        width: of width D, apart from those below.
        keys: of the width of all key heads, or of width D if the kernel repeats them.
        normed: of width D and as many of the keys' width, if queries and keys are normalized.
        depth: of width D, with mixture-of-depths.
        hidden: of width F, per slot of an expert.
        slot: of width D, per slot of a routed group and of a single-expert group.
    """

    width: int
    keys: int
    normed: int
    depth: int
    hidden: int
    slot: tuple[int, int]


# By whether layers are compiled; for `recompute = "selective"`, only products and selections.
_ALL = {
    False: _Saved(8, 2, 2, 2, 4, (3, 1)),
    True: _Saved(6, 2, 1, 1, 3, (3, 1)),
}
_SELECTIVE = {
    False: _Saved(8, 2, 0, 1, 2, (1, 1)),
    True: _Saved(6, 2, 0, 1, 2, (1, 1)),
}


def activation_bytes(recipe: Recipe, device: torch.device) -> int:
    """Return the peak memory of `pretrain` in bytes, without weights and their gradients.

    Args:
        recipe: `engine` determines the precision and what is recomputed.
        device: determines the precision if the recipe does not.
    """
    config, data = recipe.model, recipe.data
    counts = model_counts(recipe, recipe.text_tokenizer.vocabulary_size)
    tokens = data.micro_batch_size * data.sequence_length
    size = recipe.engine.compute_dtype(device).itemsize
    compiled = recipe.pretrain.compile
    is_document = config.attention_mask == "document"
    head_width = config.dim // config.heads
    kernel = kernel_name(
        device, recipe.engine.compute_dtype(device), head_width, recipe.engine.deterministic
    )
    is_masked = kernel == "masked"
    saved = peak = 0.0
    for kind in counts.layer_kinds().values():
        has_depth = kind.token_fraction < 1
        # For grouped queries, flash attention and a mask need repeated keys and values.
        repeats_keys = kernel == "varlen" or (is_masked and (has_depth or is_document))
        keys = config.dim if repeats_keys else counts.key_width
        everything = size * _saved_numbers(counts, kind, tokens, _ALL[compiled], keys)
        if has_depth and is_masked:
            everything += size * _mask_numbers(counts, kind)
        selective = size * _saved_numbers(counts, kind, tokens, _SELECTIVE[compiled], keys)
        layer_input = size * tokens * config.dim
        by_recompute = {"none": everything, "layer": layer_input, "selective": selective}
        of_layer = by_recompute[recipe.engine.recompute]
        saved += kind.layers * of_layer
        # While the gradients of a layer are computed: two vectors of width D and one of F.
        backward = size * kind.tokens * (2 * config.dim + config.hidden_width)
        if kind.layers:
            peak = max(peak, everything - of_layer + backward)
    mask = tokens * data.sequence_length * size if is_masked and is_document else 0
    rotary = 4 * tokens * config.dim // config.heads
    # One chunk's logits (in fp32, and targets, unless compiled), and gradients of the head.
    logits = min(tokens, chunk_tokens(counts.vocabulary_size, device)) * counts.vocabulary_size
    loss = 2 * logits * size if compiled else 9 * logits
    loss += tokens * config.dim * size + 2 * counts.vocabulary_size * config.dim * 4
    return round(saved + mask + rotary + max(peak, loss))


def _saved_numbers(
    counts: ModelCounts, kind: LayerKind, tokens: int, saved: _Saved, keys: int
) -> float:
    """Return how many numbers one layer saves for a micro-batch of `tokens` tokens.

    `keys` is the total width of the keys, or of the values, that attention saves.
    """
    config = counts.config
    has_depth = kind.token_fraction < 1
    normed = saved.normed * config.query_key_norm
    token = (saved.width + normed + saved.depth * has_depth) * config.dim
    token += saved.keys * keys + normed * counts.key_width
    numbers = kind.tokens * token
    numbers += has_depth * tokens * config.dim  # a depth router reads all tokens
    routed, single, dense = counts.expert_slots(kind)
    numbers += (routed + single + dense) * saved.hidden * config.hidden_width
    if config.implementation == "batched":  # the groups' weights are concatenated
        experts = sum(g.experts for g in config.group_list if g.experts > 1)
        numbers += experts * 3 * config.dim * config.hidden_width
    return numbers + (routed * saved.slot[0] + single * saved.slot[1]) * config.dim


def _mask_numbers(counts: ModelCounts, kind: LayerKind) -> int:
    """Return the size of the attention mask that a layer with mixture-of-depths saves."""
    depth = counts.config.depth_config
    by_sequence = depth is not None and depth.scope == "sequence"
    return kind.pairs if by_sequence else kind.tokens**2
