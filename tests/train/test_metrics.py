"""Log records: losses are means over all steps, throughput is that of this process."""

from types import SimpleNamespace

import pytest
import torch

from moma.runtime.world import World
from moma.train import metrics
from moma.train.metrics import MetricsWindow
from moma.vocabulary import Vocabulary

WORLD = World(torch.device("cpu"))


def test_throughput_after_a_resume_is_of_this_process_only(tiny, monkeypatch):
    now = 100.0
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now))
    model = tiny.build_model(Vocabulary.load(tiny.data.path / "vocabulary.json"))
    before, after = (MetricsWindow(tiny, model, 1.0, WORLD) for _ in range(2))
    sums = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    before.add(sums, tokens=500, data_wait=7.0)
    after.set_state(before.get_state())
    after.restart_clock()
    now += 4
    after.add(3 * sums, tokens=200, data_wait=1.0)
    after.start_record({"step": 2}, {"norm": torch.tensor(1.5)}, {})
    found = after.finish_record()
    assert found is not None and after.finish_record() is None
    record, _ = found
    assert (record["loss"], record["loss_text"], record["loss_image"]) == (2.0, 3.0, 1.0)
    assert record["tokens_per_second"] == pytest.approx(50)
    assert record["data_wait_fraction"] == pytest.approx(0.25)
    assert record["seconds_left"] == pytest.approx(4 * (tiny.pretrain.steps - 2))
