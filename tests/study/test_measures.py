"""Agreement with expert choice, scores, suites, and data that is closed after an error."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moma.model.depth import DepthConfig
from moma.model.routing import Routing
from moma.runs import Run
from moma.runtime.world import World
from moma.study import measures
from moma.study.measures import MEASURES, losses, measure_routing, measure_scores
from moma.train.loop import train
from moma.train.restore import load_run
from moma.train.statistics import router_names
from moma.train.step import no_head, run_model, to_device
from moma.vocabulary import IMAGE, TEXT
from tests.command_line import succeeds
from tests.study.test_grid import held_out

CPU = torch.device("cpu")


@torch.no_grad()
def test_agreement_of_thresholds_by_modality_equals_slow_counts(tiny, tmp_path):
    depth = DepthConfig(modality_factors={"text": 0.5, "image": 0.3})
    model = tiny.model.model_copy(update={"groups": "mod_moe_1t1i", "depth": depth})
    with torch.enable_grad():
        run = train(
            tiny.model_copy(update={"run": tmp_path / "run", "model": model}),
            World(CPU),
            quiet=True,
        )
    loaded, recipe = load_run(run)
    found = measure_routing(run)["agreement"]
    (depth_router,) = [index for index, r in enumerate(loaded.routers()) if len(r.threshold_E) == 2]
    agreed: dict[int, list[bool]] = {TEXT: [], IMAGE: []}
    for batch in held_out(loaded, recipe):
        on_device = to_device(batch, CPU)
        modalities = loaded.modality_of_id[on_device.tokens_BS].flatten().tolist()
        choice = loaded.named_routing("choice", record_selection=True)
        record = run_model(loaded, on_device, choice, no_head).routers[depth_router]
        threshold_M = [*loaded.routers()][depth_router].threshold_E
        for n, modality in enumerate(modalities):
            if record.eligible_N[n]:
                above = record.logits_NE[n, 0] > threshold_M[modality]
                agreed[modality].append(bool(above) == bool(record.selected_NE[n, 0]))
    for modality, name in ((TEXT, "0.depth text"), (IMAGE, "0.depth image")):
        expected = sum(agreed[modality]) / len(agreed[modality])
        assert found[name]["threshold"] == pytest.approx(expected)


def test_held_out_data_is_closed_when_its_consumer_fails(tiny, monkeypatch):
    closed = []

    def fail(model, recipe, routing, batches):
        next(batches)
        raise MemoryError

    class Data(list):
        def close(self):
            closed.append(True)

    monkeypatch.setattr(measures, "Batches", lambda *arguments, **options: Data([None]))
    monkeypatch.setattr(measures, "sum_losses", fail)
    # The error, still referenced below, refers to the frame and thus to the iterator.
    model: Any = SimpleNamespace(vocabulary=None)
    with pytest.raises(MemoryError) as error:
        losses(model, tiny, Routing(), 0)
    assert closed and error.value


@torch.no_grad()
def test_scores_equal_slow_means_over_tokens(trained):
    run = Run(trained / "run")
    model, recipe = load_run(run)
    slow: dict[tuple[str, str], list[float]] = {}
    for batch in held_out(model, recipe):
        on_device = to_device(batch, CPU)
        modalities = model.modality_of_id[on_device.tokens_BS].flatten().tolist()
        routing = model.named_routing("choice", record_selection=True)
        records = run_model(model, on_device, routing, no_head).routers
        for name, record in zip(router_names(model), records, strict=True):
            for n, modality in enumerate(modalities):
                if record.eligible_N[n]:
                    key = f"{name} {model.vocabulary.modalities[modality]}"
                    for e, logit in enumerate(record.logits_NE[n].tolist()):
                        slow.setdefault((key, str(e)), []).append(1 / (1 + math.exp(-logit)))
    found = measure_scores(run)
    assert len(slow) == sum(map(len, found.values()))
    for (router, expert), scores in slow.items():
        assert found[router][expert] == pytest.approx(sum(scores) / len(scores), rel=1e-5)


@pytest.mark.parametrize("name", ["perplexity", "captions"])
def test_suites_of_a_study_are_those_of_evaluate(trained, name):
    found = MEASURES[name](Run(trained / "run"), 0)
    printed = json.loads(succeeds("evaluate", trained / "run", "--suite", name, "--json"))
    for source, row in printed["sources"].items():
        expected = {key: value for key, value in row.items() if key != "documents"}
        values = {key: each and each["value"] for key, each in expected.items()}
        assert found[source] == pytest.approx(values)
    assert found.keys() == printed["sources"].keys()
