"""Memory of one GPU in training by part, without allocating anything.

model on the meta device → how each parameter is sharded → weights, gradients, optimizer state
                                                         → gathered units
`activations.py`                                         → activations
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from moma.bench.synthetic import synthetic_vocabulary
from moma.model.transformer import Transformer
from moma.runtime.sharding import DTYPES, shard_dimension
from moma.train.recipe import Recipe
from moma.train.stages import freeze_for_stage, fsdp_units

_WEIGHT = 4  # bytes; weights, gradients and the two moments of AdamW are fp32


def meta_model(recipe: Recipe) -> Transformer:
    """Return the recipe's model on the meta device, as `pretrain` would train it."""
    with torch.device("meta"):
        model = Transformer(recipe.model, synthetic_vocabulary(recipe), recipe.shares)
    freeze_for_stage(model, trains_routers=False)
    return model


def held_bytes(model: nn.Module, ranks: int, rank: int = 0) -> dict[str, int]:
    """Return the bytes that a rank holds after backward, when all gradients exist.

    FSDP2 splits a dimension into shards of equal size; the last ones may be smaller or empty.
    Parameters and gradients are padded to the full size, but the optimizer state is not. So the
    first rank holds the most.

    Args:
        model: not sharded; may be a `meta_model`.
        ranks: number of ranks that a copy of the model is sharded over; 1: not sharded.
        rank: the rank.

    Returns:
        `parameters`, `gradients`, `optimizer`.
    """
    held = trained = state = 0
    for parameter in model.parameters():
        own, largest = _shard(parameter, ranks, rank)
        held += largest
        if parameter.requires_grad:
            trained += largest
            state += 2 * own * _WEIGHT + _WEIGHT  # AdamW's moments, and its step count
    return {
        "parameters": held * _WEIGHT,
        "gradients": trained * _WEIGHT,
        "optimizer": state,
    }


def _shard(parameter: Tensor, ranks: int, rank: int) -> tuple[int, int]:
    """Elements of a rank's shard of a parameter, and of the largest shard."""
    dimension = shard_dimension(parameter, ranks)
    length = parameter.shape[dimension]
    most = -(-length // ranks)
    own = min(most, max(0, length - rank * most))
    rest = parameter.numel() // length
    return own * rest, most * rest


def gathered_bytes(model: Transformer, recipe: Recipe, ranks: int, device: torch.device) -> int:
    """Return the bytes of the unsharded weights and gradients that exist at once on a rank.

    The root unit (embedding, head) and its gradients stay unsharded during a step. Of the others,
    one is gathered while the previous one computes; in backward, the latter's gradients exist as
    well, in the compute and in the reduce dtype. A single GPU that computes in bf16 also holds a
    bf16 copy of its weights.
    """
    size = recipe.engine.compute_dtype(device).itemsize
    if ranks == 1:
        return 0 if size == _WEIGHT else size * _elements(model.parameters())
    sent = DTYPES[recipe.engine.reduce].itemsize
    root, units = unit_elements(model)
    two = max((a + b for a, b in pairwise(units)), default=sum(units))
    return 2 * root * size + two * size + max(units, default=0) * (size + sent)


def unit_elements(model: Transformer) -> tuple[int, list[int]]:
    """Return the elements of the root unit, and of the others in the order of gathering."""
    left = dict.fromkeys(model.parameters())
    sizes = []
    for unit in fsdp_units(model):
        own = [p for p in unit.parameters() if p in left]
        sizes.append(_elements(own))
        for parameter in own:
            del left[parameter]
    return _elements(left), sizes


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
