"""Measures over documents, with bootstrap intervals (Efron 1979).

Every measure is a ratio of sums over documents, such as nats over tokens, or a function of one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# A measure from its ratio, such as `exponential` for a perplexity.
Formula = Callable[[float], float]
_SAMPLES = 1000
_PERCENTILES = 2.5, 97.5


class Record(NamedTuple):
    """What a document, or a question, adds to the measures.

    Attributes:
        sums: numerator and denominator of each measure's ratio.
    """

    source: str
    sums: Mapping[str, tuple[float, float]]


def identity(ratio: float) -> float:
    """The formula of a measure that is a ratio itself."""
    return ratio


def exponential(ratio: float) -> float:
    """The formula of a perplexity, from nats a token; infinity where it overflows."""
    try:
        return math.exp(ratio)
    except OverflowError:
        return math.inf


def finite(value: float) -> float | None:
    """The value, or None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def summarize(
    records: Sequence[Record], formulas: Mapping[str, Formula]
) -> dict[str, dict[str, Any]]:
    """Measures of all documents, and of those of each source.

    Returns:
        For `all` and each source, `documents` and for each measure `value`, `low` and `high`: a 95%
        interval by a bootstrap over documents. A measure without anything to count is None, as is
        a number that is infinite.
    """
    table_RM2 = np.array([[record.sums[name] for name in formulas] for record in records], float)
    sources = np.array([record.source for record in records])
    rows = {"all": _row(table_RM2, formulas)}
    for source in dict.fromkeys(sources.tolist()):
        rows[source] = _row(table_RM2[sources == source], formulas)
    return rows


def _row(table_RM2: np.ndarray, formulas: Mapping[str, Formula]) -> dict[str, Any]:
    documents = len(table_RM2)
    random = np.random.default_rng(0)
    weights_R = np.ones(documents)
    samples = [_values(table_RM2, weights_R, formulas)]
    for _ in range(_SAMPLES):
        drawn = random.integers(documents, size=documents)
        weights_R = np.bincount(drawn, minlength=documents).astype(float)
        samples.append(_values(table_RM2, weights_R, formulas))
    row: dict[str, Any] = {"documents": documents}
    for name, (value, *resampled) in zip(formulas, zip(*samples, strict=True), strict=True):
        known = [each for each in resampled if not math.isnan(each)]
        # Interpolation next to an infinite value is NaN.
        with np.errstate(invalid="ignore"):
            low, high = np.percentile(known, _PERCENTILES).tolist() if known else [math.nan] * 2
        interval = {"value": finite(value), "low": finite(low), "high": finite(high)}
        row[name] = None if math.isnan(value) else interval
    return row


def _values(
    table_RM2: np.ndarray, weights_R: np.ndarray, formulas: Mapping[str, Formula]
) -> list[float]:
    sums_M2 = np.tensordot(weights_R, table_RM2, 1)
    return [
        formula(numerator / denominator) if denominator else math.nan
        for formula, (numerator, denominator) in zip(
            formulas.values(), sums_M2.tolist(), strict=True
        )
    ]
