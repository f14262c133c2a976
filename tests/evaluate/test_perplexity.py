"""Held-out losses against a slow reference, with both routings."""

import math

import numpy as np
import pytest
import torch

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import NO_LABEL
from moma.data.shards import open_shards
from moma.errors import UserError
from moma.evaluate.perplexity import evaluate, sum_losses
from moma.model.routing import Auxiliary, ExpertChoice, Routing, uniform_routing
from moma.train.step import run_model, to_device
from moma.vocabulary import IMAGE, Vocabulary


def slow_losses(model, recipe) -> tuple[list[float], list[float]]:
    """Return text and image losses of the held-out documents, one by one, with causal routing."""
    text: list[float] = []
    image: list[float] = []
    for source in recipe.data.sources:
        shard = open_shards(recipe.data.folder(source.name), model.vocabulary).splits["held_out"]
        for index in range(len(shard)):
            ids = torch.from_numpy(shard.ids(index).astype(np.int64))
            with torch.no_grad():
                logits = model(ids[None], routing=uniform_routing(Auxiliary())).head[0]
            log_probabilities = logits.double().log_softmax(-1)
            for at, target in enumerate(ids[1:].tolist()):
                is_image = model.vocabulary.modality_of_id[target] == IMAGE
                (image if is_image else text).append(-float(log_probabilities[at, target]))
    return text, image


@pytest.mark.parametrize("groups", ["dense", "moe_2t2i"])
def test_causal_evaluation_equals_documents_one_by_one(tiny, groups):
    recipe = tiny.model_copy(update={"model": tiny.model.model_copy(update={"groups": groups})})
    # One sequence holds everything, so that no document is split and loses its context.
    data = recipe.data.model_copy(update={"micro_batch_size": 1, "sequence_length": 2048})
    recipe = recipe.model_copy(update={"data": data})
    model = recipe.build_model(Vocabulary.load(data.path / "vocabulary.json")).eval()
    text, image = slow_losses(model, recipe)
    result = evaluate(model, recipe, "auxiliary", quiet=True)
    assert result["tokens"] == len(text) + len(image)
    assert result["loss_text"] == pytest.approx(np.mean(text), rel=1e-5)
    assert result["loss_image"] == pytest.approx(np.mean(image), rel=1e-5)
    assert result["loss"] == pytest.approx(np.mean(text + image), rel=1e-5)
    assert result["perplexity_image"] == pytest.approx(math.exp(np.mean(image)))


def test_an_infinite_perplexity_is_none(tiny):
    model = tiny.build_model(Vocabulary.load(tiny.data.path / "vocabulary.json")).eval()
    with torch.no_grad():
        model.head.weight.mul_(1e6)
    result = evaluate(model, tiny, "auxiliary", quiet=True)
    assert (result["loss_text"] or 0) > 710
    assert result["perplexity_text"] is None


def test_data_without_held_out_documents_is_named(tiny):
    model = tiny.build_model(Vocabulary.load(tiny.data.path / "vocabulary.json")).eval()
    with pytest.raises(UserError, match=f"{tiny.data.path}: no held-out documents"):
        sum_losses(model, tiny, Routing(), [])


def test_expert_choice_and_causal_routing_differ(tiny):
    model = tiny.build_model(Vocabulary.load(tiny.data.path / "vocabulary.json")).eval()
    choice, causal = (evaluate(model, tiny, by, quiet=True) for by in ("choice", "auxiliary"))
    assert choice["tokens"] == causal["tokens"]
    assert choice["loss"] != causal["loss"]


def test_expert_choice_uses_actual_capacity(tiny):
    """Held-out batches do not have the recipe's modality shares, so static capacity differs."""
    model = tiny.build_model(Vocabulary.load(tiny.data.path / "vocabulary.json")).eval()
    expected = {}
    for capacity in ("actual", "static"):
        loss, targets = 0.0, 0
        for batch in Batches(tiny.data, model.vocabulary, seed=tiny.seed, split="held_out"):
            on_device = to_device(batch, torch.device("cpu"))
            with torch.no_grad():
                routing = uniform_routing(ExpertChoice(capacity))
                output = run_model(model, on_device, routing)
            loss_BS = torch.nn.functional.cross_entropy(
                output.head.transpose(1, 2),
                on_device.labels_BS,
                ignore_index=NO_LABEL,
                reduction="none",
            )
            loss, targets = (
                loss + float(loss_BS.double().sum()),
                targets + int((on_device.labels_BS != NO_LABEL).sum()),
            )
        expected[capacity] = loss / targets
    found = evaluate(model, tiny, "choice", quiet=True)["loss"]
    assert found == pytest.approx(expected["actual"], rel=1e-6)
    assert found != pytest.approx(expected["static"], rel=1e-5)
