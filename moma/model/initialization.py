"""Random initial weights, of which each rank draws only the part that it holds."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

# Elements drawn from one generator; a rank draws whole blocks, so its shards should not be smaller.
_BLOCK = 2**18

# Returns the rows of a parameter that this rank holds, and the number of the first one.
LocalRows = Callable[[Tensor], tuple[Tensor, int]]


def all_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter that is not sharded."""
    return parameter, 0


def draw_normal(
    rows: Tensor, first_row: int, shape: torch.Size, std: float, seed: int, name: str
) -> None:
    """Fill some rows of a parameter with normally distributed values, in place.

    The flattened parameter is divided into blocks, each with a generator of its own. So a value
    depends only on its position, the seed, and the parameter's name and shape.

    Args:
        rows: the rows to fill, contiguous, on any device.
        first_row: number of the first of them.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    generator, flat = torch.Generator(), rows.view(-1)
    start = first_row * shape[1:].numel()
    stop = start + len(flat)
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        first, end = block * _BLOCK, min((block + 1) * _BLOCK, shape.numel())
        generator.manual_seed(int.from_bytes(digest) + block)
        values = torch.empty(end - first).normal_(std=std, generator=generator)
        low, high = max(first, start), min(end, stop)
        flat[low - start : high - start] = values[low - first : high - first]
