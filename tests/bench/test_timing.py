"""Rounds, clocks and ratios of jobs that are compared."""

import statistics
import time

import pytest

from moma.bench.timing import interleaved, median_ratio, seconds, spread


def test_every_round_starts_with_another_job():
    order: list[int] = []
    done: list[int] = []

    def job(index):
        order.append(index)
        return float(len(order))

    jobs = [lambda index=index: job(index) for index in range(3)]
    found = interleaved(jobs, 3, done.append)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert found == [[1, 6, 8], [2, 4, 9], [3, 5, 7]]
    assert done == [1, 2, 3]


@pytest.mark.parametrize("cpu_time", [True, False])
def test_cpu_time_excludes_waiting(cpu_time):
    found = seconds(lambda: time.sleep(0.05), cpu_time)
    assert (found < 0.05) is cpu_time


def test_ratios_and_spread():
    assert median_ratio([1.0, 6.0, 9.0], [1.0, 2.0, 3.0]) == 3
    assert spread([1.0]) == 0
    low, middle, high = statistics.quantiles([1.0, 2.0, 4.0], n=4, method="inclusive")
    assert spread([4.0, 1.0, 2.0]) == pytest.approx((high - low) / 2 / middle)
