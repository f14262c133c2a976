"""Timing of jobs that are compared: interleaved rounds, medians and ratios.

What is compared runs in turn, round after round, each round starting with another job: on a shared
machine speed changes with time, and not with the job.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from operator import truediv

import torch

from moma.runtime.peak import synchronise

Job = Callable[[], object]
Clock = Callable[[], float]


def clock_of(cpu_time: bool) -> Clock:
    """Seconds of this process's processor time, all threads added up, or of wall-clock time."""
    return time.process_time if cpu_time else time.perf_counter


def seconds(
    job: Job, clock: Clock = time.perf_counter, device: torch.device | None = None
) -> float:
    """How long a job takes, its work on the device included."""
    if device is not None:
        synchronise(device)
    start = clock()
    job()
    if device is not None:
        synchronise(device)
    return clock() - start


def rotated(count: int, round_number: int) -> list[int]:
    """The numbers below `count`, each round starting with another."""
    return [(index + round_number) % count for index in range(count)]


def interleaved(
    timed: Sequence[Callable[[], float]],
    rounds: int,
    after_round: Callable[[int], object] = lambda done: None,
) -> list[list[float]]:
    """Run every job once a round.

    Args:
        timed: jobs that return their seconds.
        rounds: number of rounds.
        after_round: called with the number of rounds done.

    Returns:
        The seconds of each job, by round.
    """
    found: list[list[float]] = [[] for _ in timed]
    for number in range(rounds):
        for index in rotated(len(timed), number):
            found[index].append(timed[index]())
        after_round(number + 1)
    return found


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of values to others, round by round."""
    return statistics.median(map(truediv, values, others))


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range, relative to the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle
