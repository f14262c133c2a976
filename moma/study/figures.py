"""Plots of the report, drawn without a display."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from moma.study.speedup import LOSSES, Axis, smoothed

# Frames of images: all right, half, none; the same as in the style of a page.
MARKS = {"ok": "#1a7f4b", "half": "#d29922", "no": "#c2413b"}


def loss_curves(
    variants: Mapping[str, Sequence[Sequence[dict[str, Any]]]], axis: Axis = "flops"
) -> list[Figure]:
    """Smoothed training loss over FLOPs or seconds: the mean over seeds, and a band of all seeds.

    Args:
        variants: the log records of the run of each seed, by variant.
        axis: the records' key.

    Returns:
        A figure for each loss, without those that no run has.
    """
    plots = []
    for title, key in LOSSES.items():
        plot, axes = _panel(title, "training FLOPs" if axis == "flops" else "seconds of training")
        for number, (name, runs) in enumerate(variants.items()):
            curves = [smoothed(records, key, axis) for records in runs]
            if not all(len(loss) for _, loss in curves):
                continue  # data of one modality has no loss of the other
            x = np.unique(np.concatenate([at for at, _ in curves]))
            x = x[(x >= max(at[0] for at, _ in curves)) & (x <= min(at[-1] for at, _ in curves))]
            if not len(x):
                continue  # one run ended, in seconds, before another began to log
            losses = np.stack([np.interp(x, at, loss) for at, loss in curves])
            color = f"C{number}"  # the same in all figures, whatever runs they leave out
            axes.plot(x, losses.mean(0), label=name, linewidth=1.6, color=color)
            axes.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.2)
        plots.append(plot)
    return _with_lines(plots)


def scaling_laws(scaling: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Figure]:
    """Held-out loss of every run over FLOPs, the fitted laws, and the predicted intervals.

    Args:
        scaling: curve → loss → `points`, `law` and `prediction`; see `results.summarize`.

    Returns:
        A figure for each loss, without those that no run has.
    """
    plots = []
    for title, key in LOSSES.items():
        plot, axes = _panel(title, "training FLOPs")
        axes.set_xscale("log")
        for number, (name, by_loss) in enumerate(scaling.items()):
            if key not in by_loss:
                continue
            points, law, prediction = (by_loss[key][of] for of in ("points", "law", "prediction"))
            color = f"C{number}"
            axes.plot(law["flops"], law["loss"], label=name, linewidth=1.2, color=color)
            axes.scatter(points["flops"], points["loss"], s=14, color=color)
            if law["low"] is not None:
                axes.fill_between(law["flops"], law["low"], law["high"], color=color, alpha=0.2)
            if prediction is not None:
                low, high = prediction["low"], prediction["high"]
                middle, half = (low + high) / 2, (high - low) / 2
                axes.errorbar(prediction["flops"], middle, half, fmt="none", color=color, capsize=5)
        plots.append(plot)
    return _with_lines(plots)


def score_map(scores: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Mean scores of routers: a row for each router and modality, a column for each expert."""
    table = np.full((len(scores), max(map(len, scores.values()))), np.nan)
    for row, by_expert in zip(table, scores.values(), strict=True):
        row[: len(by_expert)] = list(by_expert.values())
    plot = Figure(figsize=(4.4, 1.2 + 0.18 * len(table)), layout="constrained")
    axes = plot.subplots()
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_title(title)
    axes.set_xlabel("expert")
    axes.set_ylabel("router and modality")
    axes.set_yticks(range(len(scores)), list(scores), fontsize=7)
    axes.set_xticks(range(table.shape[1]))
    plot.colorbar(image)
    return plot


def _panel(title: str, x_label: str) -> tuple[Figure, Axes]:
    plot = Figure(figsize=(4.4, 3.4), layout="constrained")
    axes = plot.subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel("loss (nats per token)")
    axes.set_yscale("log")
    axes.grid(alpha=0.25, which="both")
    return plot, axes


def _with_lines(plots: Sequence[Figure]) -> list[Figure]:
    """The figures that show something, with a legend each."""
    found = [plot for plot in plots if plot.axes[0].lines]
    for plot in found:
        plot.axes[0].legend(frameon=False, fontsize=8)
    return found


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
