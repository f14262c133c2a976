"""Runs of one seed are trained on the same micro-batches, whatever their models."""

import numpy as np
import pytest
import torch

from moma.evaluate.perplexity import evaluate
from moma.runtime.world import World
from moma.study.grid import read_study, run_unfinished
from moma.train import step
from tests.factories import write_study

VARIANTS = [
    {"name": "dense", "model": {"groups": "dense"}},
    {"name": "experts", "model": {"groups": "mod_moe_2t2i"}},
]


@pytest.fixture
def trained_batches(monkeypatch) -> list[np.ndarray]:
    """What is trained on from now on: tokens, labels and documents of each micro-batch."""
    seen: list[np.ndarray] = []
    to_device = step.to_device

    def record(batch, device):
        seen.append(np.stack((batch.tokens_BS, batch.labels_BS, batch.document_ids_BS)))
        return to_device(batch, device)

    monkeypatch.setattr(step, "to_device", record)
    return seen


def test_variants_of_a_seed_train_on_the_same_batches_and_other_seeds_on_others(
    tiny, tmp_path, trained_batches
):
    table = {"seeds": [0, 1], "measures": ["held_out"], "batches": 1, "variants": VARIANTS}
    study = read_study(write_study(tiny, tmp_path, table), ["pretrain.steps=3"])
    by_run = {}
    for run in study.runs[:3]:
        trained_batches.clear()
        assert run_unfinished([run], evaluate, World(torch.device("cpu"))) == {}
        by_run[run.name] = np.array(trained_batches)
    first, second = by_run["dense-0"], by_run["dense-1"]
    assert len(first) == 3 * study.recipe.pretrain.gradient_accumulation_steps
    assert not any(np.array_equal(first[0], other) for other in first[1:])
    np.testing.assert_array_equal(first, by_run["experts-0"])
    assert not any(np.array_equal(*pair) for pair in zip(first, second, strict=True))
