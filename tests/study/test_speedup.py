"""The speed-up factor η against a slow search along the curve."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moma.study.speedup import FINAL_SHARE, LOSSES, smoothed, speedup, speedups


def records_of(losses, flops_each=1.0):
    return [
        {"flops": flops_each * number, "loss": loss, "loss_text": loss, "loss_image": loss}
        for number, loss in enumerate(losses, 1)
    ]


def slow_smoothed(losses):
    """The mean over as many records as 5% of the run has, ending at each record."""
    width = max(1, round(FINAL_SHARE * len(losses)))
    means = []
    for end in range(len(losses)):
        window = losses[max(0, end - width + 1) : end + 1]
        means.append(sum(window) / len(window))
    return means


def slow_speedup(dense, sparse, dense_flops, sparse_flops):
    """Follow the sparse curve in straight lines down to the final loss of the dense run."""
    goal = slow_smoothed(dense)[-1]
    curve = slow_smoothed(sparse)
    for number, loss in enumerate(curve, 1):
        if loss <= goal:
            crossing = number * sparse_flops
            if number > 1:
                before = curve[number - 2]
                crossing -= sparse_flops * (goal - loss) / (before - loss)
            return len(dense) * dense_flops / crossing
    return None


LOSS_CURVES = st.lists(st.floats(0.01, 10), min_size=1, max_size=60)


@settings(deadline=None, max_examples=300)
@given(LOSS_CURVES, LOSS_CURVES, st.floats(0.5, 2), st.floats(0.5, 2))
def test_the_speedup_equals_that_of_a_slow_search(dense, sparse, dense_flops, sparse_flops):
    # At a tie, rounding decides whether the goal is reached.
    goal = slow_smoothed(dense)[-1]
    assume(all(abs(loss - goal) > 1e-9 for loss in slow_smoothed(sparse)))
    expected = slow_speedup(dense, sparse, dense_flops, sparse_flops)
    found = speedup(records_of(dense, dense_flops), records_of(sparse, sparse_flops), "loss")
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-4))


@settings(deadline=None)
@given(LOSS_CURVES)
def test_smoothing_is_a_trailing_mean(losses):
    flops, loss = smoothed(records_of(losses, 3.0), "loss")
    assert np.allclose(loss, slow_smoothed(losses))
    assert flops.tolist() == [3.0 * number for number in range(1, len(losses) + 1)]


def test_learning_twice_as_fast_is_a_speedup_of_two():
    dense = records_of([10 - 0.1 * step for step in range(1, 20)])
    sparse = records_of([10 - 0.2 * step for step in range(1, 20)])
    assert speedup(dense, sparse, "loss") == pytest.approx(2)


def test_the_crossing_is_interpolated():
    dense = records_of([5.0, 4.0])
    sparse = records_of([6.0, 2.0])
    assert speedup(dense, sparse, "loss") == pytest.approx(2 / 1.5)


def test_an_unreached_loss_gives_none():
    assert speedup(records_of([3.0, 1.0]), records_of([3.0, 1.5]), "loss") is None


def test_the_first_crossing_counts():
    dense, sparse = records_of([3.0, 3.0, 3.0, 2.0]), records_of([2.5, 2.0, 9.0, 1.0])
    assert speedup(dense, sparse, "loss") == pytest.approx(2)


def test_each_loss_has_its_own_speedup():
    dense, sparse = records_of([4.0, 2.0]), records_of([4.0, 2.0])
    for record in sparse:
        record["loss_text"] += 1
        record["loss_image"] /= 2
    found = speedups(dense, sparse)
    assert list(found) == list(LOSSES) == ["all", "text", "image"]
    assert found["all"] == pytest.approx(1)
    assert found["text"] is None
    assert found["image"] == pytest.approx(2)
