"""The speed-up factor η: how much less compute a sparse model needs for a dense model's loss.

η = FLOPs of the dense run / FLOPs at which the sparse run first reaches the dense run's final loss
(MoMa §4.2, footnote 6; on the training loss, as there). The same over wall-clock seconds tells
whether fewer FLOPs are also less time.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

LOSSES = {"all": "loss", "text": "loss_text", "image": "loss_image"}
# Half the width of the smoothing window, in ln FLOPs.
HALF_WIDTH = 0.25

Records = Sequence[dict[str, Any]]
Axis = Literal["flops", "seconds"]
AXES: dict[Axis, str] = {"flops": "compute", "seconds": "time"}


def with_seconds(records: Records) -> list[dict[str, Any]]:
    """Log records with `seconds`, the training time up to each; pauses do not count."""
    found, seconds, tokens = [], 0.0, 0
    for record in records:
        seconds += (record["tokens"] - tokens) / record["tokens_per_second"]
        tokens = record["tokens"]
        found.append(record | {"seconds": seconds})
    return found


def training_seconds(records: Records) -> float | None:
    """Seconds up to the last of the records of `with_seconds`; None if there are none."""
    return records[-1]["seconds"] if records else None


def smoothed(records: Records, key: str, axis: Axis = "flops") -> tuple[np.ndarray, np.ndarray]:
    """FLOPs, or seconds, and smoothed loss of each log record that has this loss.

    The loss is a local linear regression over ln FLOPs: a line is fitted to the records within
    about 25% of each one's FLOPs. Unlike a trailing mean, it does not lag behind a falling loss,
    neither early, where it falls fast, nor at the end, where no later records exist (Fan &
    Gijbels 1992, "Variable bandwidth and local linear regression smoothers").
    """
    known = [record for record in records if record[key] is not None]
    flops = np.array([record[axis] for record in known], dtype=float)
    loss = np.array([record[key] for record in known], dtype=float)
    x = np.log(flops)
    x -= x.mean() if len(x) else 0.0  # differences of squares below would lose digits
    start, end = np.searchsorted(x, x - HALF_WIDTH), np.searchsorted(x, x + HALF_WIDTH, "right")

    def window_mean(values: np.ndarray) -> np.ndarray:
        sums = np.concatenate(([0.0], np.cumsum(values)))
        return (sums[end] - sums[start]) / (end - start)

    mean_x, mean_loss = window_mean(x), window_mean(loss)
    variance = window_mean(x * x) - mean_x**2
    covariance = window_mean(x * loss) - mean_x * mean_loss
    # Records of equal FLOPs, or a single one, have no slope.
    slope = np.divide(covariance, variance, out=np.zeros_like(x), where=variance > 1e-12)
    return flops, mean_loss + slope * (x - mean_x)


def speedup(dense: Records, sparse: Records, key: str, axis: Axis = "flops") -> float | None:
    """η for one loss, interpolated between log records; None if the loss is never reached."""
    dense_flops, dense_loss = smoothed(dense, key, axis)
    flops, loss = smoothed(sparse, key, axis)
    if not len(dense_loss) or not (loss <= dense_loss[-1]).any():
        return None
    at = int(np.argmax(loss <= dense_loss[-1]))
    crossing = flops[at]
    if at > 0:
        part = (loss[at - 1] - dense_loss[-1]) / (loss[at - 1] - loss[at])
        crossing = flops[at - 1] + part * (flops[at] - flops[at - 1])
    return float(dense_flops[-1] / crossing)


def speedups(dense: Records, sparse: Records, axis: Axis = "flops") -> dict[str, float | None]:
    """η overall, for text targets and for image targets."""
    return {name: speedup(dense, sparse, key, axis) for name, key in LOSSES.items()}
