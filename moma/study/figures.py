"""Plots of the report, drawn without a display."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from moma.study.speedup import LOSSES, Axis, smoothed

# Frames of images: all right, half, none; the same as in the style of a page.
MARKS = {"ok": "#1a7f4b", "half": "#d29922", "no": "#c2413b"}


def loss_curves(
    variants: Mapping[str, Sequence[Sequence[dict[str, Any]]]], axis: Axis = "flops"
) -> Figure:
    """Smoothed training loss over FLOPs or seconds: the mean over seeds, and a band of all seeds.

    Args:
        variants: the log records of the run of each seed, by variant.
        axis: the records' key.
    """
    plot = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (title, key) in zip(plot.subplots(1, len(LOSSES)), LOSSES.items(), strict=True):
        for name, runs in variants.items():
            curves = [smoothed(records, key, axis) for records in runs]
            if not all(len(loss) for _, loss in curves):
                continue  # data of one modality has no loss of the other
            x = np.unique(np.concatenate([at for at, _ in curves]))
            x = x[(x >= max(at[0] for at, _ in curves)) & (x <= min(at[-1] for at, _ in curves))]
            if not len(x):
                continue  # one run ended, in seconds, before another began to log
            losses = np.stack([np.interp(x, at, loss) for at, loss in curves])
            (line,) = axes.plot(x, losses.mean(0), label=name, linewidth=1.6)
            axes.fill_between(x, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2)
        axes.set_title(title)
        axes.set_xlabel("training FLOPs" if axis == "flops" else "seconds of training")
        axes.set_yscale("log")
        axes.grid(alpha=0.25, which="both")
    plot.axes[0].set_ylabel("loss (nats per token)")
    if plot.axes[0].lines:
        plot.axes[0].legend(frameon=False)
    return plot


def sheet(images: Sequence[tuple[Image.Image, str, str]], columns: int = 8) -> Figure:
    """Images with captions below, framed by their marks (`ok`, `half` or `no`)."""
    rows = -(-len(images) // columns)
    plot = Figure(figsize=(1.55 * columns, 1.85 * rows), layout="constrained")
    for axes in plot.subplots(rows, columns, squeeze=False).flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for axes, (image, caption, mark) in zip(plot.axes, images, strict=False):
        axes.imshow(image, interpolation="lanczos")
        axes.spines[:].set(visible=True, color=MARKS[mark], linewidth=1.8)
        axes.set_title(caption.replace(", ", ",\n").replace(" of ", " of\n"), fontsize=7.5, y=-0.42)
    return plot
