"""Measures and their bootstrap intervals."""

import math

import numpy as np
import pytest

from moma.evaluate.summary import Record, exponential, identity, summarize


def test_measures_are_ratios_of_sums_by_source():
    records = [
        Record("a", {"ratio": (1, 2), "perplexity": (1, 1)}),
        Record("b", {"ratio": (3, 2), "perplexity": (2, 3)}),
        Record("a", {"ratio": (0, 4), "perplexity": (0, 0)}),
    ]
    rows = summarize(records, {"ratio": identity, "perplexity": math.exp})
    assert [*rows] == ["all", "a", "b"]
    assert [row["documents"] for row in rows.values()] == [3, 2, 1]
    assert [row["ratio"]["value"] for row in rows.values()] == pytest.approx([0.5, 1 / 6, 1.5])
    expected = [math.exp(3 / 4), math.exp(1), math.exp(2 / 3)]
    assert [row["perplexity"]["value"] for row in rows.values()] == pytest.approx(expected)


def test_measure_without_anything_to_count_is_none():
    assert summarize([Record("a", {"x": (0, 0)})], {"x": identity})["all"]["x"] is None


def test_an_infinite_perplexity_is_none():
    """800 nats per token overflow; resampled perplexities may be finite."""
    records = [Record("a", {"x": (0, 1)}), Record("a", {"x": (1600, 1)})]
    rows = summarize([*records, Record("b", {"x": (1600, 1)})], {"x": exponential})
    assert rows["a"]["x"] == {"value": None, "low": 1, "high": None}
    assert rows["b"]["x"] == {"value": None, "low": None, "high": None}


def test_interval_is_that_of_the_mean():
    """Of 400 numbers with standard deviation 1: the mean ± 1.96 / 20."""
    values = np.random.default_rng(1).standard_normal(400)
    values = (values - values.mean()) / values.std() + 5
    row = summarize([Record("a", {"x": (value, 1)}) for value in values], {"x": identity})["all"]
    assert row["x"]["value"] == pytest.approx(5)
    assert row["x"]["low"] == pytest.approx(5 - 0.098, abs=0.02)
    assert row["x"]["high"] == pytest.approx(5 + 0.098, abs=0.02)


def test_interval_resamples_documents_not_tokens():
    """Two documents of many tokens: the mean is that of either, or between them."""
    records = [Record("a", {"x": (0, 1000)}), Record("a", {"x": (1000, 1000)})]
    row = summarize(records, {"x": identity})["all"]
    assert (row["x"]["low"], row["x"]["high"]) == (0, 1)
