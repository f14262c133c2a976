"""The speed-up factor η: on curves of known η, and its smoothing against a slow regression."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.study.speedup import HALF_WIDTH, LOSSES, smoothed, speedup, speedups

RECORDS = 1000


def records_of(losses, flops_each=1.0):
    return [
        {"flops": flops_each * number, "loss": loss, "loss_text": loss, "loss_image": loss}
        for number, loss in enumerate(losses, 1)
    ]


def learning_curve(compute, noise=0.0, seed=0):
    """Losses of a power law with an offset after given shares of the dense run's compute."""
    random = np.random.default_rng(seed)
    return 1.5 + 1.2 * (compute + 0.002) ** -0.25 + random.normal(0, noise, len(compute))


@pytest.mark.parametrize("eta", [1.1, 1.5, 2.0, 3.7, 4.2, 5.2, 6.0])
def test_eta_of_noisy_curves_is_recovered_within_two_percent(eta):
    share = np.arange(1, RECORDS + 1) / RECORDS
    found = np.array(
        [
            speedup(
                records_of(learning_curve(share, 0.02, seed)),
                records_of(learning_curve(eta * share, 0.02, seed + 100)),
                "loss",
            )
            for seed in range(20)
        ],
        dtype=float,
    )
    assert np.mean(found) == pytest.approx(eta, rel=0.01)
    assert np.sqrt(np.mean((found / eta - 1) ** 2)) < 0.02


def test_eta_does_not_depend_on_how_often_a_run_is_logged():
    share = np.arange(1, RECORDS + 1) / RECORDS
    dense = records_of(learning_curve(share))
    sparse = records_of(learning_curve(3 * share))
    assert speedup(dense, sparse[9::10], "loss") == pytest.approx(3, rel=0.01)
    assert speedup(dense[9::10], sparse, "loss") == pytest.approx(3, rel=0.01)


def slow_smoothed(flops, losses):
    """The value at each record of a line fitted to the records near it."""
    x = np.log(flops)
    values = []
    for number, here in enumerate(x):
        near = np.abs(x - here) <= HALF_WIDTH
        if near.sum() == 1:
            values.append(losses[number])
        else:
            values.append(np.polyfit(x[near] - here, np.array(losses)[near], 1)[1])
    return values


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=60), st.floats(0.5, 1e20))
def test_smoothing_equals_a_line_fitted_at_each_record(losses, flops_each):
    records = records_of(losses, flops_each)
    flops, loss = smoothed(records, "loss")
    assert flops.tolist() == [record["flops"] for record in records]
    np.testing.assert_allclose(loss, slow_smoothed(flops, losses), rtol=1e-4, atol=1e-4)


def test_learning_twice_as_fast_is_a_speedup_of_two():
    dense = records_of([10 - 0.1 * step for step in range(1, 20)])
    sparse = records_of([10 - 0.2 * step for step in range(1, 20)])
    assert speedup(dense, sparse, "loss") == pytest.approx(2, rel=0.02)


def test_the_crossing_is_interpolated():
    dense = records_of([5.0, 4.0])
    sparse = records_of([6.0, 2.0])
    assert speedup(dense, sparse, "loss") == pytest.approx(2 / 1.5)


def test_an_unreached_loss_gives_none():
    assert speedup(records_of([3.0, 1.0]), records_of([3.0, 1.5]), "loss") is None


def test_a_run_without_any_loss_gives_none():
    without = records_of([None, None])
    assert speedup(without, records_of([3.0, 1.0]), "loss") is None
    assert speedup(records_of([3.0, 1.0]), without, "loss") is None


def test_records_without_a_loss_are_left_out():
    share = np.arange(1, RECORDS + 1) / RECORDS
    dense, sparse = (records_of(learning_curve(eta * share).tolist()) for eta in (1, 2))
    for records in (dense, sparse):
        records[0]["loss"] = records[300]["loss"] = records[-1]["loss"] = None
    assert speedup(dense, sparse, "loss") == pytest.approx(2, rel=0.02)


def test_the_first_crossing_counts():
    # Records so far apart that none is near another.
    dense = [{"flops": 2.0**number, "loss": loss} for number, loss in enumerate([3.0, 2.0, 2.0])]
    sparse = [{"flops": 2.0**number, "loss": loss} for number, loss in enumerate([3.0, 2.0, 9.0])]
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
