"""Which images a step of a codec's training sees: everything follows from seed and step."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moma.data.documents import unit_hash

_STARTING_IMAGES = 256


def order_of_batches(count: int, batch_size: int, start: int, seed: int) -> Iterator[list[int]]:
    """Indices of the batches from step `start` on: one shuffled epoch after the other."""
    position = start * batch_size
    epoch, indices = -1, []
    while True:
        batch = []
        for place in range(position, position + batch_size):
            if place // count != epoch:
                epoch = place // count
                draw = torch.Generator().manual_seed(step_seed(seed, epoch, "order"))
                indices = torch.randperm(count, generator=draw).tolist()
            batch.append(indices[place % count])
        position += batch_size
        yield batch


def stack_images(images: Sequence[Tensor], indices: list[int]) -> Tensor:
    """Images stacked as floats in [−1, 1]."""
    batch_B3HW = torch.stack([images[index] for index in indices])
    if batch_B3HW.dtype == torch.uint8:
        return batch_B3HW.float() / 255 * 2 - 1
    return batch_B3HW


def first_images(images: Sequence[Tensor], seed: int) -> Tensor:
    """A random sample that the codebook starts on."""
    sample = min(len(images), _STARTING_IMAGES)
    return stack_images(images, next(order_of_batches(len(images), sample, 0, seed)))


def step_seed(seed: int, step: int, purpose: str = "step") -> int:
    """A seed for each step: consecutive seeds give unrelated numbers only if they are hashed."""
    return int(unit_hash(f"{purpose} {seed} {step}") * 2**53)
