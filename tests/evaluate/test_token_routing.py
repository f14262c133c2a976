"""The routing of a document against decisions made token by token."""

import math

import numpy as np
import pytest
import torch

from moma.data.batches.packing import Batch
from moma.evaluate.token_routing import first_tokens, route_document
from moma.model.architecture import ModelConfig
from moma.model.transformer import Transformer
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary()
IMAGE = [3, 5, 9, 20, 11, 4]
DOCUMENT = np.array([0, 30, 31, 22, *IMAGE, 33, 25, 3, 8, 8, 6, 13, 4, 27, 1])
IS_CODE = np.isin(DOCUMENT, range(5, 21))


def make_model(groups, **changes):
    config = ModelConfig(
        groups=groups, dim=16, layers=3, heads=2, experts_implementation="sequential", **changes
    )
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialize(1)
    draw = torch.Generator().manual_seed(2)
    for router in model.routers():  # a threshold for each expert
        router.cutoff_means_3E[0] = torch.randn(router.out_features, generator=draw) * 0.3
        router.cutoff_means_3E[1:] = 1
    return model.eval()


class Inputs:
    """The inputs of every router of a model in a forward pass, [N, D]."""

    def __init__(self, model):
        self.of_group: dict[tuple[int, int], np.ndarray] = {}
        self.of_depth: dict[int, np.ndarray] = {}
        for number, layer in enumerate(model.layers):
            for index, group in enumerate(layer.experts.groups):
                self._keep(group, self.of_group, (number, index), 2)
            if hasattr(layer, "depth"):
                self._keep(layer.depth, self.of_depth, number, 3)

    def _keep(self, module, found, key, dims):
        def hook(_, arguments):
            x = arguments[0].detach().double()
            found[key] = (x if dims == 2 else x.flatten(0, 1)).numpy()

        module.register_forward_pre_hook(hook)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def weight_of(router, expert):
    return router.weight[expert].detach().double().numpy()


def causal_reference(model, inputs, ids=DOCUMENT):
    """For each layer and token, the factor of the update, and those of the experts; or None."""
    found = []
    for number, layer in enumerate(model.layers):
        depth: list[float | None] = [1.0] * len(ids)
        if number in inputs.of_depth:
            logits = [x @ weight_of(layer.depth.router, 0) for x in inputs.of_depth[number]]
            threshold = float(layer.depth.router.threshold_E[0])
            depth = [sigmoid(logit) if logit > threshold else None for logit in logits]
        reached = [n for n in range(len(ids)) if depth[n] is not None]
        experts: list[dict[tuple[int, int], float]] = [{} for _ in ids]
        for index, group in enumerate(layer.experts.groups):
            own = {0, 1} if not hasattr(group, "modalities") else {*group.modalities}
            for place, n in enumerate(reached):
                if int(IS_CODE[n]) not in own:
                    continue
                if not hasattr(group, "router"):
                    experts[n][index, 0] = 1.0
                    continue
                x = inputs.of_group[number, index][place]
                for e, threshold in enumerate(group.router.threshold_E.tolist()):
                    if (logit := x @ weight_of(group.router, e)) > threshold:
                        experts[n][index, e] = sigmoid(logit)
        found.append((depth, experts))
    return found


def as_reference(routed):
    """A routing in the form of `causal_reference`."""
    return [
        (
            [
                float(weight) if is_processed else None
                for weight, is_processed in zip(weights, processed, strict=True)
            ],
            [
                {
                    (index, int(e)): float(group.weight_LSE[layer, n, e])
                    for index, group in enumerate(routed.groups)
                    for e in np.flatnonzero(group.taken_LSE[layer, n])
                }
                for n in range(len(weights))
            ],
        )
        for layer, (weights, processed) in enumerate(
            zip(routed.weight_LS, routed.processed_LS, strict=True)
        )
    ]


def assert_equal(found, expected):
    for (depth, experts), (expected_depth, expected_experts) in zip(found, expected, strict=True):
        assert [each is None for each in depth] == [each is None for each in expected_depth]
        assert [e for e in depth if e is not None] == pytest.approx(
            [e for e in expected_depth if e is not None], abs=1e-5
        )
        assert [*map(set, experts)] == [*map(set, expected_experts)]
        for each, expected_each in zip(experts, expected_experts, strict=True):
            assert each == pytest.approx(expected_each, abs=1e-5)


@pytest.mark.parametrize(
    "groups",
    [
        "dense",
        "moe_1t1i",
        "moe_3x",
        "moe_2t3i",
        "mod_moe_2t1i",
        "mod",
        ({"modalities": ("text", "image"), "experts": 1}, {"modalities": ("text",), "experts": 2}),
    ],
)
def test_causal_routing_is_that_of_single_tokens(groups):
    model = make_model(groups)
    inputs = Inputs(model)
    routed = route_document(model, DOCUMENT, "causal")
    assert_equal(as_reference(routed), causal_reference(model, inputs))
    assert routed.depth_layers == model.config.depth_layers
    taken = np.concatenate([group.taken_LSE.ravel() for group in routed.groups])
    assert taken.any() and (groups == "dense" or not taken.all())


def test_weights_of_null_experts_are_normalized():
    model = make_model("null_3t3i")
    inputs = Inputs(model)
    routed = route_document(model, DOCUMENT, "causal")
    for number, layer in enumerate(model.layers):
        for index, group in enumerate(layer.experts.groups):
            own = [n for n in range(len(DOCUMENT)) if int(IS_CODE[n]) in group.modalities]
            for n in own:
                x = inputs.of_group[number, index][n]
                logits = [x @ weight_of(group.router, o) for o in range(4)]
                logits += logits[-1:] * (group.router.null_experts - 1)
                best = sorted(range(len(logits)), key=lambda q: -logits[q])[:2]
                real = {e: math.exp(logits[e]) for e in best if e < 3}
                expected = [real.get(e, 0) / (sum(real.values()) or 1) for e in range(3)]
                found = routed.groups[index]
                assert found.weight_LSE[number, n].tolist() == pytest.approx(expected, abs=1e-5)
                assert set(np.flatnonzero(found.taken_LSE[number, n])) == set(real)


def test_under_choice_the_document_competes_with_the_micro_batch():
    model = make_model("moe_2t2i")
    inputs = Inputs(model)
    tokens_BS = np.random.default_rng(0).integers(5, 40, (3, 24))
    zeros_BS = np.zeros_like(tokens_BS)
    positions_BS = zeros_BS + np.arange(24)
    batch = Batch(tokens_BS, zeros_BS, zeros_BS, positions_BS, images=0, padding=0, origins=())
    before = tokens_BS.copy()
    routed = route_document(model, DOCUMENT, "choice", batch)
    assert (batch.tokens_BS == before).all()
    padding = [VOCABULARY.padding] * (24 - len(DOCUMENT))
    ids = [*DOCUMENT, *padding, *before[1:].ravel()]
    for number, layer in enumerate(model.layers):
        for index, group in enumerate(layer.experts.groups):
            own = [n for n, id_ in enumerate(ids) if id_ != 2 and (5 <= id_ < 21) == index]
            for e in range(2):
                x_ND = inputs.of_group[number, index]
                logit = {n: x_ND[n] @ weight_of(group.router, e) for n in own}
                best = sorted(own, key=lambda n: -logit[n])[: math.ceil(len(own) / 2)]
                expected = [sigmoid(logit[n]) if n in best else 0 for n in range(len(DOCUMENT))]
                found = routed.groups[index].weight_LSE[number, :, e].tolist()
                assert found == pytest.approx(expected, abs=1e-5)
    alone = route_document(model, DOCUMENT, "choice")
    assert (alone.groups[0].taken_LSE != routed.groups[0].taken_LSE).any()


@pytest.mark.parametrize(
    ("context", "expected"), [(50, 20), (20, 20), (18, 18), (17, 12), (13, 12), (12, 12), (9, 4)]
)
def test_only_what_fits_the_context_is_read_and_no_image_is_cut(context, expected):
    assert len(DOCUMENT) == 20
    assert (first_tokens(DOCUMENT, context, VOCABULARY) == DOCUMENT[:expected]).all()
