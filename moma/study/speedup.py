"""The speed-up factor η: how much less compute a sparse model needs for a dense model's loss.

η = FLOPs of the dense run / FLOPs at which the sparse run first reaches the dense run's final loss
(MoMa §4.2, footnote 6; on the training loss, as there).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

LOSSES = {"all": "loss", "text": "loss_text", "image": "loss_image"}
FINAL_SHARE = 0.05

Records = Sequence[dict[str, Any]]


def smoothed(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs and loss of each log record; the loss is a mean over the last 5% of the records."""
    flops = np.array([record["flops"] for record in records])
    values = np.array([record[key] for record in records], dtype=float)  # None becomes NaN
    width = max(1, round(FINAL_SHARE * len(records)))
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(records) + 1)
    starts = np.maximum(0, ends - width)
    return flops, (sums[ends] - sums[starts]) / (ends - starts)


def speedup(dense: Records, sparse: Records, key: str) -> float | None:
    """η for one loss, interpolated between log records; None if the loss is never reached."""
    dense_flops, dense_loss = smoothed(dense, key)
    flops, loss = smoothed(sparse, key)
    reached = np.flatnonzero(loss <= dense_loss[-1])
    if not len(reached):
        return None
    at = reached[0]
    crossing = flops[at]
    if at > 0:
        part = (loss[at - 1] - dense_loss[-1]) / (loss[at - 1] - loss[at])
        crossing = flops[at - 1] + part * (flops[at] - flops[at - 1])
    return float(dense_flops[-1] / crossing)


def speedups(dense: Records, sparse: Records) -> dict[str, float | None]:
    """η overall, for text targets and for image targets."""
    return {name: speedup(dense, sparse, key) for name, key in LOSSES.items()}
