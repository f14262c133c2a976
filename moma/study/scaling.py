"""Scaling: loss over training FLOPs as a power law with an offset, fitted to several sizes.

    L(C) = offset + scale · C^(−exponent)

(arXiv 2203.15556 §3.3, at a fixed ratio of tokens to parameters or steps.) Each architecture is a
curve of variants of growing size. The largest size of a curve is left out of the fit and predicted.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar, nnls

# Bootstrap samples, and their seed.
SAMPLES, SEED = 200, 0
MIN_SIZES = 3
_PARAMETERS = 3
# With fewer runs beyond the parameters of a law, intervals would be too narrow.
_MIN_FREEDOM = 6
_MAX_EXPONENT = 2


class PowerLaw(NamedTuple):
    """L(C) = offset + (C / unit)^(−exponent) · scale; `unit` keeps the numbers near 1."""

    offset: float
    scale: float
    exponent: float
    unit: float

    def __call__(self, flops: np.ndarray | float) -> np.ndarray:
        """The loss after training FLOPs C."""
        return self.offset + self.scale * (np.asarray(flops) / self.unit) ** -self.exponent


class Prediction(NamedTuple):
    """The loss of a size that was not fitted.

    Attributes:
        low, high: the 95% interval of the prediction.
        measured: the mean over seeds.
    """

    flops: float
    low: float
    high: float
    measured: float

    @property
    def is_inside(self) -> bool:
        """Whether the measured loss is inside the interval."""
        return self.low <= self.measured <= self.high


class Curve(NamedTuple):
    """The runs of an architecture and the laws fitted to resampled runs.

    Attributes:
        flops, loss: of every run, [runs].
        laws: fitted to all sizes; the first to the runs as they are, the others to bootstrap
            samples of them, if there are at least nine.
        prediction: of the largest size by laws fitted to the smaller ones; None if these are fewer
            than three sizes or nine runs.
    """

    flops: np.ndarray
    loss: np.ndarray
    laws: Sequence[PowerLaw]
    prediction: Prediction | None


def fit_power_law(flops: np.ndarray, loss: np.ndarray) -> PowerLaw:
    """Least squares of the relative error, with offset ≥ 0, scale ≥ 0 and 0 < exponent ≤ 2.

    Given the exponent, a law is linear in offset and scale, so that only the exponent is searched
    for (variable projection, Golub & Pereyra 1973).

    Raises:
        ValueError: there are fewer than three different FLOPs.
    """
    if len(np.unique(flops)) < MIN_SIZES:
        raise ValueError("a power law with an offset needs three sizes")
    unit = float(np.exp(np.log(flops).mean()))

    def solve(exponent: float) -> tuple[np.ndarray, float]:
        """Offset and scale, and the norm of the relative errors."""
        columns = np.stack((np.ones_like(loss), (flops / unit) ** -exponent), axis=1)
        return nnls(columns / loss[:, None], np.ones_like(loss))

    # Of losses without a trend there may be several minima.
    tried = np.geomspace(1e-4, _MAX_EXPONENT, 12)
    best = int(np.argmin([solve(exponent)[1] for exponent in tried]))
    exponent = minimize_scalar(
        lambda exponent: solve(exponent)[1] ** 2,
        bounds=(tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]),
        method="bounded",
        options={"xatol": 1e-8},
    ).x
    offset, scale = solve(exponent)[0]
    return PowerLaw(float(offset), float(scale), float(exponent), unit)


def fit_curve(flops: np.ndarray, loss: np.ndarray, seed: int = SEED) -> Curve:
    """Fit an architecture's runs.

    Args:
        flops, loss: of every run, [runs]; runs of one size have equal FLOPs.
        seed: of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    largest = flops.max()
    is_smaller = flops < largest
    smaller = flops[is_smaller], loss[is_smaller]
    prediction = None
    if len(np.unique(smaller[0])) >= MIN_SIZES and len(smaller[1]) >= _PARAMETERS + _MIN_FREEDOM:
        laws = _bootstrap(*smaller, generator)
        # A measured mean over seeds deviates from the law as the fitted losses do.
        residual = _residuals(laws[0], *smaller)
        deviation = generator.choice(residual, (len(laws), int((~is_smaller).sum()))).mean(1)
        predicted = np.array([law(largest) for law in laws]) * (1 + deviation)
        low, high = np.quantile(predicted, [0.025, 0.975])
        measured = float(loss[~is_smaller].mean())
        prediction = Prediction(float(largest), float(low), float(high), measured)
    return Curve(flops, loss, _bootstrap(flops, loss, generator), prediction)


def crossing(first: PowerLaw, second: PowerLaw, start: float, end: float) -> float | None:
    """The lowest FLOPs between `start` and `end` at which the order of two laws changes."""
    flops = np.geomspace(start, end, 4000)
    sign = np.sign(first(flops) - second(flops))
    changes = np.flatnonzero(sign[1:] != sign[:-1])
    return float(flops[changes[0] + 1]) if len(changes) else None


def crossings(curves: Mapping[str, Curve]) -> dict[tuple[str, str], list[float]]:
    """FLOPs at which pairs of curves cross, up to 1,000 times the largest, in each sample.

    A sample in which two curves do not cross contributes nothing. Samples of two curves are drawn
    independently and paired by their number.
    """
    start = min(curve.flops.min() for curve in curves.values())
    end = 1000 * max(curve.flops.max() for curve in curves.values())
    return {
        (a, b): [
            found
            for first, second in zip(curves[a].laws, curves[b].laws, strict=False)
            if (found := crossing(first, second, start, end)) is not None
        ]
        for a, b in combinations(curves, 2)
    }


def _bootstrap(
    flops: np.ndarray, loss: np.ndarray, generator: np.random.Generator
) -> list[PowerLaw]:
    """The law of the runs, then laws of runs drawn with replacement from all sizes and seeds."""
    law = fit_power_law(flops, loss)
    if len(loss) < _PARAMETERS + _MIN_FREEDOM:
        return [law]
    drawn = (_draw(flops, generator) for _ in range(SAMPLES))
    return [law, *(fit_power_law(flops[runs], loss[runs]) for runs in drawn)]


def _draw(flops: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Indices of runs drawn with replacement, of at least three sizes.

    They are fewer than the runs by the fitted parameters: samples as large would spread too little.
    """
    while True:
        runs = generator.integers(len(flops), size=len(flops) - _PARAMETERS)
        if len(np.unique(flops[runs])) >= MIN_SIZES:
            return runs


def _residuals(law: PowerLaw, flops: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Relative deviations of runs from a law, enlarged for its fitted parameters."""
    return (loss / law(flops) - 1) * (len(loss) / (len(loss) - _PARAMETERS)) ** 0.5
