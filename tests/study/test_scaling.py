"""Scaling curves: known laws are recovered, predicted and found to cross."""

import numpy as np
import pytest

from moma.study.scaling import SAMPLES, PowerLaw, crossing, crossings, fit_curve, fit_power_law

SIZES = np.array([1e15, 4e15, 1.6e16, 6.4e16])
LAW = PowerLaw(offset=1.5, scale=0.9, exponent=0.25, unit=1e16)


def runs_of(law: PowerLaw, noise: float, seed: int, sizes=SIZES, seeds=3):
    flops = np.repeat(sizes, seeds)
    return flops, law(flops) + np.random.default_rng(seed).normal(0, noise, len(flops))


def test_a_law_without_noise_is_recovered():
    found = fit_power_law(*runs_of(LAW, 0.0, 0))
    assert found(SIZES) == pytest.approx(LAW(SIZES), rel=1e-6)
    assert found.offset == pytest.approx(1.5, rel=1e-3)
    assert found.exponent == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_no_law_of_a_grid_fits_better(seed):
    """Nor where the exponent, or the offset, is at its bound, or losses rise."""
    generator = np.random.default_rng(seed)
    flops, loss = runs_of(
        LAW._replace(exponent=(0.02, 0.5)[seed % 2]), (0.003, 0.1)[seed % 2], seed
    )
    if seed >= 4:
        loss = generator.permutation(loss)
    best = fit_power_law(flops, loss)
    x, error = flops / best.unit, np.sum((best(flops) / loss - 1) ** 2)
    assert best.offset >= 0 and best.scale >= 0 and 0 < best.exponent <= 2
    for exponent in np.linspace(0.001, 2, 60):
        for offset in np.linspace(0, loss.max(), 60):
            power, rest = x**-exponent / loss, 1 - offset / loss
            scale = max(0.0, power @ rest / (power @ power))
            assert np.sum((rest - scale * power) ** 2) >= error * (1 - 1e-6)


def test_bootstrap_samples_are_of_runs_of_all_seeds_and_sizes(monkeypatch):
    flops, loss = runs_of(LAW, 0.01, 0)
    fitted = []

    def record(flops, loss):
        fitted.append((flops, loss))
        return LAW

    monkeypatch.setattr("moma.study.scaling.fit_power_law", record)
    fit_curve(flops, loss)
    runs = {*zip(flops, loss, strict=True)}
    samples = [[*zip(*sample, strict=True)] for sample in fitted[-SAMPLES:]]
    assert len(fitted) == 2 * (1 + SAMPLES)  # for the prediction as well
    assert {len(sample) for sample in samples} == {len(runs) - 3}
    assert {len({size for size, _ in sample}) for sample in samples} == {3, 4}
    assert any(len({*sample}) < len(sample) for sample in samples)  # with replacement
    assert set().union(*samples) == runs


def test_most_predictions_of_the_largest_size_contain_its_true_loss():
    inside, widths = [], []
    for seed in range(8):
        curve = fit_curve(*runs_of(LAW, 0.01, seed))
        assert curve.prediction is not None and curve.prediction.flops == SIZES[-1]
        inside.append(curve.prediction.is_inside)
        widths.append(curve.prediction.high - curve.prediction.low)
    assert np.mean(inside) >= 0.75
    assert 0.01 < np.median(widths) < 0.3  # the noise has a deviation of 0.01
    # A loss that no such law predicts is outside.
    flops, loss = runs_of(LAW, 0.001, 0)
    loss[flops == SIZES[-1]] += 0.5
    prediction = fit_curve(flops, loss).prediction
    assert prediction is not None and not prediction.is_inside


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_runs_have_no_intervals(seeds):
    """Three parameters fit three points exactly."""
    curve = fit_curve(*runs_of(LAW, 0.01, 0, seeds=seeds))
    assert len(curve.laws) == 1 and curve.prediction is None


def test_two_sizes_are_no_curve_and_three_predict_nothing():
    with pytest.raises(ValueError, match="three sizes"):
        fit_curve(*runs_of(LAW, 0.0, 0, SIZES[:2]))
    assert fit_curve(*runs_of(LAW, 0.001, 0, SIZES[:3])).prediction is None


def test_the_crossing_of_two_laws_is_found():
    steeper = PowerLaw(offset=1.4, scale=1.1, exponent=0.3, unit=1e16)
    found = crossing(LAW, steeper, 1e14, 1e20)
    assert found is not None
    assert LAW(found) == pytest.approx(steeper(found), rel=1e-3)
    assert crossing(LAW, LAW._replace(offset=1.6), 1e14, 1e20) is None
    curves = {
        name: fit_curve(*runs_of(law, 0.001, seed))
        for seed, (name, law) in enumerate({"a": LAW, "b": steeper}.items())
    }
    at = crossings(curves)["a", "b"]
    assert np.median(at) == pytest.approx(found, rel=0.3)
