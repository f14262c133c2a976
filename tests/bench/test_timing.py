"""Rounds, clocks and ratios of the jobs that are compared."""

import statistics
import time

import pytest

from moma.bench.timing import clock_of, interleaved, median_ratio, seconds, spread


def test_every_round_starts_with_another_job():
    order: list[int] = []
    done: list[int] = []

    def job(index):
        order.append(index)
        return float(len(order))

    jobs = [lambda index=index: job(index) for index in range(3)]
    taken = interleaved(jobs, 3, done.append)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert taken == [[1, 6, 8], [2, 4, 9], [3, 5, 7]]
    assert done == [1, 2, 3]


@pytest.mark.parametrize("cpu_time", [True, False])
def test_processor_time_leaves_out_waiting(cpu_time):
    taken = seconds(lambda: time.sleep(0.05), clock_of(cpu_time))
    assert (taken < 0.05) is cpu_time


def test_ratios_and_spread():
    assert median_ratio([1.0, 6.0, 9.0], [1.0, 2.0, 3.0]) == 3
    assert spread([1.0]) == 0
    low, middle, high = statistics.quantiles([1.0, 2.0, 4.0], n=4, method="inclusive")
    assert spread([4.0, 1.0, 2.0]) == pytest.approx((high - low) / 2 / middle)
