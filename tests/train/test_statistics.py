"""Statistics of routers and gradients against slow references."""

import math

import numpy as np
import pytest
import torch

from moma.data.batches.iterator import Batches
from moma.model.routing import ExpertChoice, Routing, Threshold, uniform_routing
from moma.train.recipe import Recipe
from moma.train.statistics import Statistics, describe, router_names
from moma.train.step import run_model, to_device
from moma.vocabulary import IMAGE, TEXT, Vocabulary

CPU = torch.device("cpu")


def model_of(tiny: Recipe, groups: str):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    recipe = tiny.model_copy(update={"model": tiny.model.model_copy(update={"groups": groups})})
    return vocabulary, recipe.build_model(vocabulary)


@pytest.mark.parametrize("groups", ["token_4x", "null_2t2i"])
def test_token_choice_against_counting(tiny, groups):
    vocabulary, model = model_of(tiny, groups)
    batch = to_device(next(Batches(tiny.data, vocabulary, seed=0)), CPU)
    kept, taken = (
        run_model(model, batch, uniform_routing(policy, record_selection=True)).routers
        for policy in (ExpertChoice(), Threshold())
    )
    statistics = Statistics(model)
    statistics.add_routers(kept, batch.tokens_BS)
    described = describe(statistics.sums, model, trains_routers=True)["routers"]
    modality_N = model.modality_of_id[batch.tokens_BS.flatten()]
    dropped = 0.0
    # Only in the first layer do both passes have the same input.
    for (name, found), record, all_taken in zip(described.items(), kept, taken, strict=False):
        if not name.startswith("0."):
            break
        before, after = all_taken.selected_NE.sum(), record.selected_NE.sum()
        assert found["dropped_fraction"] == pytest.approx(float(1 - after / before), abs=1e-6)
        dropped += found["dropped_fraction"]
        assert "agreement" not in found
        for key, modality in (("text", TEXT), ("image", IMAGE)):
            if key in name:
                its_NE = record.selected_NE[(modality_N == modality) & record.eligible_N]
                expected = float(its_NE.sum(1).mean())
                assert found["experts_per_token"][key] == pytest.approx(expected, rel=1e-5)
    assert dropped > 0 or "null" in groups


@pytest.mark.parametrize("groups", ["moe_4x", "mod_moe_2t2i"])
def test_routers_against_counting(tiny, groups):
    vocabulary, model = model_of(tiny, groups)
    batch = to_device(next(Batches(tiny.data, vocabulary, seed=0)), CPU)
    records = run_model(model, batch, Routing(record_auxiliary=True)).routers
    statistics = Statistics(model)
    statistics.add_routers(records, batch.tokens_BS)
    described = describe(statistics.sums, model, trains_routers=True)["routers"]
    # Of two ranks with equal tokens, the sums are twice as large.
    doubled = {name: 2 * value for name, value in statistics.sums.items()}
    assert describe(doubled, model, trains_routers=True)["routers"] == described
    names = router_names(model)
    expected_names = {
        "moe_4x": ["0.text+image", "1.text+image"],
        "mod_moe_2t2i": ["0.text", "0.image", "0.depth", "1.text", "1.image"],
    }
    assert names == list(described) == expected_names[groups]
    modality_N = vocabulary.modality_of_id[batch.tokens_BS.flatten().numpy()]
    for name, record in zip(names, records, strict=True):
        score_NE = 1 / (1 + np.exp(-record.logits_NE.detach().double().numpy()))
        assert record.auxiliary_logits_NE is not None
        predicted_NE = record.auxiliary_logits_NE.detach().numpy() > 0
        selected_NE = record.selected_NE.numpy() > 0
        counted = np.flatnonzero(record.eligible_N.numpy())
        taken = [int(selected_NE[n].sum()) for n in counted]
        entropy = [
            -(s * math.log(s) + (1 - s) * math.log(1 - s)) for n in counted for s in score_NE[n]
        ]
        found = described[name]
        assert found["entropy"] == pytest.approx(np.mean(entropy), rel=1e-4)
        assert found["agreement"] == pytest.approx(
            np.mean([predicted_NE[n] == selected_NE[n] for n in counted]), rel=1e-5
        )
        min_scores = [score_NE[selected_NE[:, e], e].min() for e in range(selected_NE.shape[1])]
        assert found["min_score"] == pytest.approx(np.mean(min_scores), rel=1e-5)
        if name.endswith("depth"):
            for key, modality in (("text", TEXT), ("image", IMAGE)):
                its = [n for n in counted if modality_N[n] == modality]
                share = np.mean([selected_NE[n].any() for n in its])
                assert found["token_fraction"][key] == pytest.approx(share, rel=1e-5)
        else:
            assert found["dropped_fraction"] == pytest.approx(
                np.mean(np.array(taken) == 0), abs=1e-6
            )
            assert found["multi_expert_fraction"] == pytest.approx(
                np.mean(np.array(taken) > 1), abs=1e-6
            )


def test_gradients_by_kind(tiny):
    _, model = model_of(tiny, "mod_moe_2t2i")
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.grad = torch.full_like(parameter, float(number))
    statistics = Statistics(model)
    statistics.add_gradients()
    norms = describe(statistics.sums, model, trains_routers=False)["gradient_norms"]
    kinds = {"embedding", "attention", "experts", "routers", "norms", "head", "auxiliary"}
    assert norms.keys() == kinds
    total = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(total, rel=1e-5)
    head = model.head.weight.grad
    assert head is not None and norms["head"] == pytest.approx(float(head.norm()), rel=1e-5)
