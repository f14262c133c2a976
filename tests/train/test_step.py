"""Losses against a slow reference; one step over micro-batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import NO_LABEL, Batch
from moma.model.routing import ExpertChoice, Routing, uniform_routing
from moma.runtime.world import World
from moma.train.cross_entropy import TokenLosses
from moma.train.stages import freeze_for_stage
from moma.train.step import (
    Step,
    next_token_loss,
    router_loss,
    run_model,
    sum_by_modality,
    to_device,
)
from moma.vocabulary import IMAGE, TEXT, Vocabulary

WORLD = World(torch.device("cpu"))


def with_lr_scale(optimizer: SGD) -> list[SGD]:
    for group in optimizer.param_groups:
        group["lr_scale"] = 1.0
    return [optimizer]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5) | st.just(NO_LABEL), min_size=1, max_size=12), st.integers(0, 99))
def test_cross_entropy_by_modality(labels, seed):
    torch.manual_seed(seed)
    labels_N = torch.tensor(labels)
    tokens = TokenLosses(*torch.rand(3, len(labels), dtype=torch.float64) * (labels_N != NO_LABEL))
    modality_of_id = torch.tensor([TEXT, TEXT, TEXT, IMAGE, IMAGE, IMAGE])
    loss_M, correct_M, targets_M = sum_by_modality(tokens, labels_N, modality_of_id, 2)
    expected, correct, targets = [0.0, 0.0], [0.0, 0.0], [0, 0]
    for index, label in enumerate(labels):
        if label != NO_LABEL:
            modality = int(modality_of_id[label])
            expected[modality] += float(tokens.loss_N[index])
            correct[modality] += float(tokens.correct_N[index])
            targets[modality] += 1
    np.testing.assert_allclose(loss_M.numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(correct_M.numpy(), correct, atol=1e-9)
    assert targets_M.tolist() == targets


def test_labels_are_shifted_exactly_once(tiny):
    """Labels of a batch are one position ahead; the loss must not shift them again."""
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    batch = next(Batches(tiny.data, vocabulary, seed=0))
    tokens, labels, documents = batch.tokens_BS, batch.labels_BS, batch.document_ids_BS
    inside = documents[:, :-1] == documents[:, 1:]
    assert inside.any()
    assert (labels[:, :-1][inside] == tokens[:, 1:][inside]).all()


def test_micro_batches_add_up_to_the_gradient_of_the_mean(tiny):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    batches = [next(source) for source in [Batches(tiny.data, vocabulary, seed=0)] * 2]
    model = tiny.build_model(vocabulary)
    for router in model.auxiliary_routers():
        router.requires_grad_(False)
    loss_function = next_token_loss(z_loss=0.0, compiled=False)
    losses = [loss_function(model, to_device(batch, WORLD.device)) for batch in batches]
    targets = sum(float(loss.targets_M.sum()) for loss in losses)
    (sum(loss.objective for loss in losses) / targets).backward()  # type: ignore[union-attr]
    trainable = [p for p in model.parameters() if p.requires_grad]
    expected = [p.grad.clone() for p in trainable if p.grad is not None]
    model.zero_grad()
    before = [p.detach().clone() for p in trainable]
    step = Step(model, with_lr_scale(SGD(trainable, lr=1.0)), loss_function, 1e9, WORLD)
    sums, norm = step(batches, learning_rate=0.5)
    for parameter, old, gradient in zip(trainable, before, expected, strict=True):
        torch.testing.assert_close(parameter, old - 0.5 * gradient, atol=1e-6, rtol=1e-5)
    total = torch.cat([g.flatten() for g in expected]).norm()
    torch.testing.assert_close(norm, total, rtol=1e-4, atol=1e-6)
    assert float(sums[2].sum()) == targets


def test_the_routers_own_loss_is_added_to_the_mean_loss(tiny):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    model = tiny.model_copy(
        update={"model": tiny.model.model_copy(update={"groups": "null_2t2i"})}
    ).build_model(vocabulary)
    batch = to_device(next(Batches(tiny.data, vocabulary, seed=0)), WORLD.device)
    with torch.no_grad():
        losses = next_token_loss()(model, batch)
        router_loss = run_model(model, batch, Routing()).router_loss
    mean = losses.loss_M.sum() / losses.targets_M.sum()  # without it
    assert router_loss is not None and router_loss > 0.01
    torch.testing.assert_close(losses.objective / losses.targets_M.sum(), mean + router_loss)


def test_the_loss_of_auxiliary_routers_is_added_as_the_mean_of_their_decisions(tiny):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    model = tiny.build_model(vocabulary)
    batch = to_device(next(Batches(tiny.data, vocabulary, seed=0)), WORLD.device)
    routing = uniform_routing(ExpertChoice(), record_selection=True, record_auxiliary=True)
    with torch.no_grad():
        losses, routers = next_token_loss()(model, batch), router_loss(model, batch)
        joint = next_token_loss(routing=routing)(model, batch)
    added = (joint.objective - losses.objective) / losses.targets_M.sum()
    expected = routers.loss_M.sum() / routers.targets_M.sum()
    assert expected > 0.01
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)


def test_a_parameter_without_gradient_is_an_error(tiny):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    model = tiny.build_model(vocabulary)  # the auxiliary routers stay trainable
    step = Step(
        model,
        with_lr_scale(SGD(model.parameters(), lr=1.0)),
        next_token_loss(0.0, False),
        1.0,
        WORLD,
    )
    with pytest.raises(RuntimeError, match="took no part"):
        step([next(Batches(tiny.data, vocabulary, seed=0))], 0.1)


def test_router_loss_is_the_binary_cross_entropy(tiny):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    model = tiny.build_model(vocabulary).double().requires_grad_(False)
    for router in model.auxiliary_routers():
        router.requires_grad_(True)
    batch = to_device(next(Batches(tiny.data, vocabulary, seed=0)), WORLD.device)
    losses = router_loss(model, batch)
    records = run_model(model, batch, Routing(record_auxiliary=True)).routers
    assert len(records) == 4  # two layers, two groups
    modality_N = vocabulary.modality_of_id[batch.tokens_BS.flatten().numpy()]
    loss, right, count = np.zeros(2), np.zeros(2), np.zeros(2)
    for record in records:
        assert record.auxiliary_logits_NE is not None
        chance_NE = record.auxiliary_logits_NE.detach().sigmoid().numpy()
        selected_NE = record.selected_NE.numpy()
        for n in np.flatnonzero(record.eligible_N.numpy()):
            for chance, chosen in zip(chance_NE[n], selected_NE[n], strict=True):
                loss[modality_N[n]] -= np.log(chance if chosen else 1 - chance)
                right[modality_N[n]] += (chance > 0.5) == bool(chosen)
                count[modality_N[n]] += 1
    np.testing.assert_allclose(losses.loss_M.numpy(), loss, rtol=1e-5)
    np.testing.assert_allclose(losses.correct_M.numpy(), right)
    np.testing.assert_allclose(losses.targets_M.numpy(), count)
    losses.objective.backward()
    for name, parameter in model.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.any())
        assert touched == ("auxiliary" in name)


def test_the_bounds_of_documents_only_grow(tiny):
    """With other bounds, layers are compiled again."""
    recipe = tiny.model_copy(update={"model": tiny.model.model_copy(update={"groups": "dense"})})
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    short = next(Batches(recipe.data, vocabulary, seed=0))
    batch = replace(
        short,
        tokens_BS=np.tile(short.tokens_BS, 4),
        labels_BS=np.tile(short.labels_BS, 4),
        document_ids_BS=np.tile(short.document_ids_BS, 4),
        positions_BS=np.tile(short.positions_BS, 4),
    )
    ids_BS = batch.document_ids_BS
    many = replace(batch, document_ids_BS=np.broadcast_to(np.arange(ids_BS.shape[1]), ids_BS.shape))
    one = replace(batch, document_ids_BS=np.zeros_like(ids_BS))
    model, bounds = recipe.build_model(vocabulary), []
    loss_function = next_token_loss()

    def recording(model, batch):
        bounds.append((batch.max_documents, batch.max_length))
        return loss_function(model, batch)

    freeze_for_stage(model, trains_routers=False)
    optimizers = with_lr_scale(SGD(model.parameters(), lr=0.1))
    step = Step(model, optimizers, recording, 1.0, WORLD)
    for batches in ([many], [one], [batch]):
        step(batches, learning_rate=0.1)
    documents, lengths = zip(*bounds, strict=True)
    assert documents == (documents[0],) * 3 and documents[0] >= ids_BS.size
    assert lengths[0] < lengths[1] == lengths[2] and lengths[1] >= ids_BS.shape[1]


def test_bounds_of_documents_are_those_of_attention(tiny):
    """Powers of two of at least 16 documents and 128 tokens."""
    starts = np.array([[0, 130], [0, 300], [0, 300]])
    ids_BS = (np.arange(300) >= starts[..., None]).sum(1) - 1
    blank = np.zeros_like(ids_BS)
    found = to_device(Batch(blank, blank, ids_BS, blank, images=0, padding=0), WORLD.device)
    assert (found.max_documents, found.max_length) == (16, 512)
    short_BS = blank[:1, :256]
    one = Batch(short_BS, short_BS, short_BS, short_BS, images=0, padding=0)
    found = to_device(one, WORLD.device)
    assert (found.max_documents, found.max_length) == (16, 256)
