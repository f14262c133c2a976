"""Plots show the measured values."""

from typing import Any

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
    plots = figures.loss_curves({name: [records] for name, records in runs.items()})
    assert [plot.axes[0].get_title() for plot in plots] == ["all", "text", "image"]
    for plot, key in zip(plots, ("loss", "loss_text", "loss_image"), strict=True):
        (axes,) = plot.axes
        assert [line.get_label() for line in axes.lines] == list(runs)
        assert axes.get_legend_handles_labels()[1] == list(runs) and axes.get_legend()
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
    plots = figures.loss_curves({"dense": [fast, slow]}, "seconds")
    assert np.asarray(plots[0].axes[0].lines[0].get_xdata()).tolist() == [1.5, 2, 3]
    for record in slow:
        record["seconds"] += 10
    assert figures.loss_curves({"dense": [fast, slow]}, "seconds") == []


def test_bands_span_the_seeds_and_losses_that_do_not_exist_have_no_figure():
    runs = [records_of([5.0, 3.0, 2.0]), records_of([5.5, 3.5, 2.5])]
    for records in runs:
        for record in records:
            record["loss_image"] = None
    plots = figures.loss_curves({"dense": runs})
    assert [plot.axes[0].get_title() for plot in plots] == ["all", "text"]
    curves = [smoothed(records, "loss")[1] for records in runs]
    mean = np.asarray(plots[0].axes[0].lines[0].get_ydata())
    assert mean[[0, -1]] == pytest.approx([(a + b) / 2 for a, b in zip(*curves, strict=True)][::2])


def test_a_run_has_one_color_in_all_figures():
    text_only, both = records_of([5.0, 3.0, 2.0]), records_of([4.0, 2.0, 1.0])
    for record in text_only:
        record["loss_image"] = None
    plots = figures.loss_curves({"text": [text_only], "both": [both]})
    assert {plot.axes[0].lines[-1].get_color() for plot in plots} == {"C1"}


def test_laws_are_drawn_with_their_runs_and_the_predicted_interval():
    law = {"flops": [1.0, 10.0, 100.0], "loss": [3.0, 2.5, 2.2], "low": None, "high": None}
    points = {"flops": [1.0, 10.0], "loss": [3.1, 2.4]}
    plain = {"points": points, "law": law, "prediction": None}
    banded = {
        "points": points,
        "law": law | {"low": [2.9, 2.4, 2.1], "high": [3.1, 2.6, 2.3]},
        "prediction": {"flops": 10.0, "low": 2.3, "high": 2.7},
    }
    plots = figures.scaling_laws({"a": {"loss": plain}, "b": {"loss": banded, "loss_text": plain}})
    assert [plot.axes[0].get_title() for plot in plots] == ["all", "text"]
    (axes,) = plots[0].axes
    assert axes.get_legend_handles_labels()[1] == ["a", "b"] and axes.get_legend()
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == law["loss"]
    found: Any = axes.collections
    runs, _, band, bar = found
    assert runs.get_offsets().tolist() == [[1.0, 3.1], [10.0, 2.4]]
    extent = band.get_paths()[0].get_extents()
    assert (extent.y0, extent.y1) == (2.1, 3.1)
    (segment,) = bar.get_segments()
    assert segment.tolist() == [[10.0, pytest.approx(2.3)], [10.0, pytest.approx(2.7)]]
    assert png_bytes(plots[0])


def test_a_map_has_a_row_for_each_router_and_a_column_for_each_expert():
    scores = {"0.text text": {"0": 0.25, "1": 0.5}, "0.depth image": {"0": 0.75}}
    plot = figures.score_map(scores, "variant")
    axes = plot.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(scores)
    image: Any = axes.images[0]
    shown = np.ma.filled(image.get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[0.25, 0.5], [0.75, np.nan]])


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
