"""A row of the log: its losses are those of all its steps, its speed that of this process."""

from types import SimpleNamespace

import pytest
import torch

from moma.runtime.world import World
from moma.train import metrics
from moma.train.metrics import Window
from moma.vocabulary import Vocabulary

WORLD = World(torch.device("cpu"))


def test_a_row_that_was_cut_in_two_has_the_speed_of_its_second_part(tiny, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now))
    model = tiny.build_model(Vocabulary.load(tiny.data.path / "vocabulary.json"))
    before, after = (Window(tiny, model, 1.0, WORLD) for _ in range(2))
    sums = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    before.add(sums, tokens=500, waiting=7.0)
    after.set_state(before.get_state())
    after.restart_clock()
    now += 4
    after.add(3 * sums, tokens=200, waiting=1.0)
    after.close_row({"step": 2}, {"norm": torch.tensor(1.5)}, {})
    found = after.finish_row()
    assert found is not None and after.finish_row() is None
    row, _ = found
    assert (row["loss"], row["loss_text"], row["loss_image"]) == (2.0, 3.0, 1.0)
    assert row["tokens_per_second"] == pytest.approx(50)
    assert row["waiting_for_data"] == pytest.approx(0.25)
    assert row["seconds_left"] == pytest.approx(4 * (tiny.pretrain.steps - 2))
