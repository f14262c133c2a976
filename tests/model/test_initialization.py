"""Initial weights: their distribution, and that any rows of them can be drawn alone."""

from itertools import pairwise

import pytest
import torch

from moma.model.initialization import draw_normal
from tests.factories import OperationCounter

SHAPE = torch.Size([1024, 1024])  # several blocks


def drawn(start: int = 0, stop: int = SHAPE[0], seed: int = 0, name: str = "a", std: float = 1.0):
    rows = torch.full((stop - start, SHAPE[1]), torch.nan)
    draw_normal(rows, start, SHAPE, std, seed, name)
    return rows


@pytest.mark.parametrize("starts", [(0, 512, 1024), (0, 1, 1, 343, 686, 1024, 1024)])
def test_rows_drawn_by_several_ranks_are_those_drawn_at_once(starts):
    """Some ranks hold nothing."""
    parts = [drawn(start, stop) for start, stop in pairwise(starts)]
    assert torch.equal(torch.cat(parts), drawn())


def test_a_rank_draws_little_more_than_its_rows():
    whole, part = OperationCounter(), OperationCounter()
    with whole:
        drawn()
    with part:
        drawn(100, 300)
    normal = "aten.normal_.default"
    assert part.counts[normal] <= 0.5 * whole.counts[normal]


def test_values_are_normally_distributed_and_independent():
    values = drawn(std=0.5).flatten().double() / 0.5
    for power, moment in enumerate((0, 1, 0, 3), start=1):
        assert (values**power).mean().item() == pytest.approx(moment, abs=0.03)
    for other in (
        values.roll(1),
        values.roll(2**18),
        *(v.flatten() for v in (drawn(seed=1), drawn(name="b"))),
    ):
        assert (values * other).mean().item() == pytest.approx(0, abs=0.005)
