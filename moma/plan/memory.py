"""Memory of one GPU while it trains, by part, before anything is allocated.

the model on no device → how each parameter is cut between ranks → weights, gradients, optimizer
                                                                 → units that are gathered
`activations.py`                                                 → activations
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn

from moma.bench.synthetic import synthetic_vocabulary
from moma.model.transformer import Transformer
from moma.runtime.sharding import DTYPES, shard_dimension
from moma.train.recipe import Recipe
from moma.train.stages import train_only, units_of

_WEIGHT = 4  # bytes: weights, their gradients and the optimizer's two means are fp32


def outline(recipe: Recipe) -> Transformer:
    """The recipe's model without weights, on the device `meta`; as `pretrain` would train it."""
    with torch.device("meta"):
        model = Transformer(recipe.model, synthetic_vocabulary(recipe), recipe.shares)
    train_only(model, routers=False)
    return model


def held_bytes(model: nn.Module, ranks: int, rank: int = 0) -> dict[str, int]:
    """What a rank holds between steps, and of gradients when all are there.

    FSDP2 cuts a dimension into parts of equal size, the last ones being smaller or empty, and
    gives each rank room for a whole part: only the optimizer's state follows the part's own size.
    So the first rank holds the most.

    Args:
        model: not sharded; may be an `outline`.
        ranks: between which a copy of the model is cut; 1: it is whole.
        rank: whose bytes.

    Returns:
        `parameters`, `gradients`, `optimizer`.
    """
    room = trained = state = 0
    for parameter in model.parameters():
        own, largest = _part(parameter, ranks, rank)
        room += largest
        if parameter.requires_grad:
            trained += largest
            state += 2 * own * _WEIGHT + _WEIGHT  # AdamW's means, and its count of steps
    return {
        "parameters": room * _WEIGHT,
        "gradients": trained * _WEIGHT,
        "optimizer": state,
    }


def _part(parameter: Tensor, ranks: int, rank: int) -> tuple[int, int]:
    """Elements of a rank's part of a parameter, and of the largest part."""
    dimension = shard_dimension(parameter, ranks)
    length = parameter.shape[dimension]
    most = -(-length // ranks)
    own = min(most, max(0, length - rank * most))
    rest = parameter.numel() // length
    return own * rest, most * rest


def gathered_bytes(model: Transformer, recipe: Recipe, ranks: int, device: torch.device) -> int:
    """Whole weights and gradients of the units that are gathered at once, on any rank.

    The outermost unit (embedding, head) stays gathered through a step, and its gradients until the
    end of it. Of the others, the next is gathered while one computes; in the backward pass that
    one's gradients are there, too, as computed and as sent. A single GPU that computes in bf16
    keeps its weights once more in bf16.
    """
    size = recipe.engine.compute_dtype(device).itemsize
    if ranks == 1:
        return 0 if size == _WEIGHT else size * _elements(model.parameters())
    sent = DTYPES[recipe.engine.reduce].itemsize
    root, units = unit_elements(model)
    two = max((a + b for a, b in pairwise(units)), default=sum(units))
    return 2 * root * size + two * size + max(units, default=0) * (size + sent)


def unit_elements(model: Transformer) -> tuple[int, list[int]]:
    """Elements of the outermost unit, and of the others in the order in which they are gathered."""
    left = dict.fromkeys(model.parameters())
    sizes = []
    for unit in units_of(model):
        own = [p for p in unit.parameters() if p in left]
        sizes.append(_elements(own))
        for parameter in own:
            del left[parameter]
    return _elements(left), sizes


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
