"""Memory of one GPU in training, by part, without allocating anything.

Weights, gradients and optimizer state follow from how FSDP2 shards each parameter of the model on
the meta device; `activations.py` adds the activations.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from moma.bench.synthetic import synthetic_vocabulary
from moma.model.transformer import Transformer
from moma.runtime.optimizer import OptimizerConfig, uses_muon
from moma.train.recipe import Recipe
from moma.train.stages import freeze_for_stage, fsdp_units

_WEIGHT = 4  # bytes; weights, gradients and the moments of the optimizers are fp32


def meta_model(recipe: Recipe) -> Transformer:
    """Return the recipe's model on the meta device, as `pretrain` would train it."""
    with torch.device("meta"):
        model = Transformer(recipe.model, synthetic_vocabulary(recipe), recipe.shares)
    freeze_for_stage(model, recipe.pretrain.auxiliary_routers)
    return model


def held_bytes(model: nn.Module, ranks: int, optimizer: OptimizerConfig) -> list[dict[str, int]]:
    """Return the bytes that each rank holds after backward, when all gradients exist.

    FSDP2 splits the rows into shards of equal size; the last ones may be smaller or empty.
    Parameters and gradients are padded to the full size, but the optimizer state is not. So the
    first rank holds the most.

    Args:
        model: not sharded; may be a `meta_model`.
        ranks: number of ranks that a copy of the model is sharded over; 1: not sharded.

    Returns:
        For each rank `parameters`, `gradients`, `optimizer`.
    """
    sizes: Counter[tuple[int, int, int]] = Counter()
    for name, parameter in model.named_parameters():
        moments = 1 if uses_muon(name, parameter, optimizer) else 2
        moments = moments if parameter.requires_grad else 0
        sizes[len(parameter), parameter.numel() // len(parameter), moments] += 1
    return [_held_by(rank, ranks, sizes) for rank in range(ranks)]


def _held_by(rank: int, ranks: int, sizes: Mapping[tuple[int, int, int], int]) -> dict[str, int]:
    """Bytes of a rank, from the number of parameters by rows, width and moments."""
    parameters = gradients = state = 0
    for (rows, width, moments), count in sizes.items():
        padded = -(-rows // ranks)
        own = min(padded, max(0, rows - rank * padded))
        size = _WEIGHT * count * padded * width
        parameters += size
        gradients += size if moments else 0
        state += _WEIGHT * count * moments * own * width
        state += _WEIGHT * count if moments == 2 else 0  # AdamW counts steps
    return {"parameters": parameters, "gradients": gradients, "optimizer": state}


def gathered_bytes(
    model: Transformer, recipe: Recipe, ranks: int, device: torch.device, nodes: int = 1
) -> int:
    """Return the bytes of the unsharded weights and gradients that exist at once on a rank.

    The root unit (embedding, head) and its gradients stay unsharded during a step. Of the others,
    one is gathered while the previous one computes; in backward, the latter's gradients exist as
    well, in the compute and in the reduce dtype. A single GPU that computes in bf16 also holds a
    bf16 copy of its weights.
    """
    size = recipe.engine.compute_dtype(device).itemsize
    if ranks == 1:
        return 0 if size == _WEIGHT else size * _elements(model.parameters())
    sent = recipe.engine.reduce_dtype(nodes).itemsize
    root, units = unit_elements(model)
    two = max((a + b for a, b in pairwise(units)), default=sum(units))
    return 2 * root * size + two * size + max(units, default=0) * (size + sent)


def accumulated_bytes(model: nn.Module, recipe: Recipe, ranks: int) -> int:
    """Return the bytes of the unsharded gradients that a rank holds between micro-batches."""
    times = recipe.pretrain.gradient_accumulation_steps
    if ranks == 1 or times == 1 or not recipe.engine.reduce_once:
        return 0
    return _WEIGHT * _elements(p for p in model.parameters() if p.requires_grad)


def unit_elements(model: Transformer) -> tuple[int, list[int]]:
    """Return the elements of the root unit, and of the others in the order of gathering."""
    remaining, sizes = set(model.parameters()), []
    for unit in fsdp_units(model):
        own = remaining.intersection(unit.parameters())
        sizes.append(_elements(own))
        remaining -= own
    return _elements(remaining), sizes


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
