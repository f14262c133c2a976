"""Plots show the measured values."""

import numpy as np
import pytest
from PIL import Image

from moma.images import png_bytes
from moma.study import figures
from moma.study.speedup import smoothed


def records_of(losses):
    return [
        {"flops": 10.0 * step, "loss": loss, "loss_text": 2 * loss, "loss_image": loss / 2}
        for step, loss in enumerate(losses, 1)
    ]


def test_every_run_has_a_curve_for_each_loss():
    runs = {"dense": records_of([5.0, 3.0, 2.0]), "sparse": records_of([4.0, 2.0, 1.0, 0.5])}
    plot = figures.loss_curves({name: [records] for name, records in runs.items()})
    assert [axes.get_title() for axes in plot.axes] == ["all", "text", "image"]
    for axes, key in zip(plot.axes, ("loss", "loss_text", "loss_image"), strict=True):
        assert [line.get_label() for line in axes.lines] == list(runs)
        for line, records in zip(axes.lines, runs.values(), strict=True):
            flops, loss = smoothed(records, key)
            assert (np.asarray(line.get_xdata()) == flops).all()
            assert (np.asarray(line.get_ydata()) == loss).all()


def test_runs_are_compared_where_all_of_them_have_records():
    fast, slow = records_of([5.0, 3.0, 2.0]), records_of([5.0, 3.0, 2.0, 1.5])
    for at, record in enumerate(fast, 1):
        record["seconds"] = at
    for at, record in enumerate(slow, 1):
        record["seconds"] = 1.5 * at
    plot = figures.loss_curves({"dense": [fast, slow]}, "seconds")
    assert np.asarray(plot.axes[0].lines[0].get_xdata()).tolist() == [1.5, 2, 3]
    for record in slow:
        record["seconds"] += 10
    plot = figures.loss_curves({"dense": [fast, slow]}, "seconds")
    assert not plot.axes[0].lines
    assert png_bytes(plot)


def test_bands_span_the_seeds_and_leave_out_losses_that_do_not_exist():
    runs = [records_of([5.0, 3.0, 2.0]), records_of([5.5, 3.5, 2.5])]
    for records in runs:
        for record in records:
            record["loss_image"] = None
    plot = figures.loss_curves({"dense": runs})
    assert [len(axes.lines) for axes in plot.axes] == [1, 1, 0]
    curves = [smoothed(records, "loss")[1] for records in runs]
    mean = np.asarray(plot.axes[0].lines[0].get_ydata())
    assert mean[[0, -1]] == pytest.approx([(a + b) / 2 for a, b in zip(*curves, strict=True)][::2])


def test_every_image_of_the_sheet_has_its_caption():
    shades = [10, 60, 110, 160, 210]
    marks = ["ok", "half", "no", "ok", "ok"]
    images = [
        (Image.new("RGB", (4, 4), (shade,) * 3), f"shade {shade}", mark)
        for shade, mark in zip(shades, marks, strict=True)
    ]
    plot = figures.sheet(images, columns=2)
    assert len(plot.axes) == 6
    for axes, shade in zip(plot.axes, shades, strict=False):
        assert axes.get_title() == f"shade {shade}"
        assert (np.asarray(axes.images[0].get_array()) == shade).all()
    frames = [axes.spines["left"].get_edgecolor() for axes in plot.axes]
    assert frames[0] == frames[3] == frames[4] and len(set(frames[:3])) == 3
    assert not plot.axes[5].images and not plot.axes[5].spines["left"].get_visible()
