"""Timing of jobs that are compared: interleaved rounds, medians and ratios.

Jobs run in turn, round after round, each round starting with another job: on a shared machine speed
varies over time, independently of the job.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from operator import truediv

import torch

from moma.runtime.peak import synchronize

Job = Callable[[], object]


def seconds(job: Job, cpu_time: bool = False, device: torch.device | None = None) -> float:
    """Measure how long a job takes.

    Args:
        cpu_time: measure the CPU time of this process, summed over its threads, instead of
            wall-clock time.
        device: the device to wait for, before and after the job.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    if device is not None:
        synchronize(device)
    start = clock()
    job()
    if device is not None:
        synchronize(device)
    return clock() - start


def interleaved(
    timed: Sequence[Callable[[], float]],
    rounds: int,
    after_round: Callable[[int], object] = lambda done: None,
) -> list[list[float]]:
    """Run every job once per round.

    Args:
        timed: jobs that return their seconds.
        after_round: called with the number of completed rounds.

    Returns:
        The seconds of each job, by round.
    """
    found: list[list[float]] = [[] for _ in timed]
    for number in range(rounds):
        for index in range(len(timed)):
            shifted = (index + number) % len(timed)
            found[shifted].append(timed[shifted]())
        after_round(number + 1)
    return found


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios of values to others, round by round."""
    return statistics.median(map(truediv, values, others))


def spread(values: Sequence[float]) -> float:
    """Return half the interquartile range, relative to the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle
