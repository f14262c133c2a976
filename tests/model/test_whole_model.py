"""The whole model against a slow reference: every key, routing and mix of tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.model.architecture import ModelConfig
from moma.model.depth import DepthConfig
from moma.model.routing import Auxiliary, ExpertChoice, Routing, uniform_routing
from moma.model.transformer import Transformer
from moma.vocabulary import Vocabulary
from tests.factories import make_vocabulary
from tests.model import three_modalities
from tests.model.model_reference import model as slow_model
from tests.model.model_reference import numpy
from tests.model.three_modalities import group

TWO = make_vocabulary(100, range(50, 100))
GROUPS: list[Any] = [
    "dense",
    "moe_3x",
    "moe_1t1i",
    "moe_2t2i",
    "moe_3t1i",
    (group("text", 2), group("image", 1), group("text image", 2)),
    (group("text", 1), group("text image", 1), group("image", 3)),
]
ROUTINGS = {
    "static": Routing(record_selection=True),
    "actual": uniform_routing(ExpertChoice("actual"), record_selection=True),
    "causal": uniform_routing(Auxiliary()),
}
SHAPES = [(1, 5), (2, 8), (4, 6), (9, 4)]


@dataclass
class Case:
    """A model and a batch for it."""

    config: ModelConfig
    vocabulary: Vocabulary
    shares: tuple[float, ...]
    batch: tuple[np.ndarray, np.ndarray, np.ndarray]
    seed: int

    def build(self) -> Transformer:
        model = Transformer(self.config, self.vocabulary, self.shares)
        model.initialize(self.seed)
        torch.manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # otherwise ones and zeros
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model.double().eval()


def batch_of(vocabulary, shape, parts, variety, padded, seed):
    """Return tokens with fractions `parts` and `variety` ids of each modality, in random documents.

    With few ids, many tokens are equal and their scores tie.
    """
    random = np.random.default_rng(seed)
    ids = np.arange(vocabulary.size)
    pools = [
        random.permutation(ids[(vocabulary.modality_of_id == m) & (ids != vocabulary.padding)])
        for m in range(len(parts))
    ]
    kinds = random.choice(len(parts), size=shape, p=parts)
    tokens = np.vectorize(lambda m: random.choice(pools[m][:variety]), otypes=[np.int64])(kinds)
    documents = (random.random(shape) < 0.25).cumsum(axis=1)
    if padded:
        tokens[-1, shape[1] // 2 :], documents[-1, shape[1] // 2 :] = vocabulary.padding, -1
    positions = np.array(
        [[(each[:s] == each[s]).sum() for s in range(shape[1])] for each in documents]
    )
    return tokens, documents, positions


@st.composite
def cases(draw):
    def one_of(*values):
        return draw(st.sampled_from(values))

    three = one_of(False, False, True)
    vocabulary = three_modalities.VOCABULARY if three else TWO
    of_three = ((0.5, 0.25, 0.25), (0.2, 0.7, 0.1))
    of_two = ((0.5, 0.5), (0.75, 0.25), (0.4, 0.6), (1.0, 0.0))
    shares = one_of(*(of_three if three else of_two))
    depth: DepthConfig | None = None
    if scope := one_of(None, "batch", "sequence", "modality"):
        factors = {name: one_of(0.2, 0.5, 1.0) for name in vocabulary.modalities}
        depth = DepthConfig(modality_factors=factors)
        if scope != "modality":
            depth = DepthConfig(capacity_factor=one_of(0.2, 0.25, 0.5, 0.7), scope=scope)
    config = ModelConfig(
        groups=one_of(*(three_modalities.GROUPS if three else GROUPS)),
        depth=depth,
        dim=16,
        hidden=11,
        layers=one_of(1, 3),
        heads=4,
        kv_heads=one_of(1, 2, 4),
        norm=one_of("swin", "pre"),
        query_key_norm=one_of(True, True, False),
        rope_theta=one_of(10_000.0, 50.0),
        attention_mask=one_of("document", "causal"),
        tied_embeddings=one_of(False, True),
        experts_implementation=one_of(None, "sequential", "batched", "grouped"),
    )
    absent = draw(st.integers(0, len(shares) - 1))
    without = np.array([float(m != absent) for m in range(len(shares))])
    other = np.ones(len(shares))
    parts = np.array(one_of(shares, other, without))
    seed = draw(st.integers(0, 9999))
    batch = batch_of(
        vocabulary, one_of(*SHAPES), parts / parts.sum(), one_of(2, 100), draw(st.booleans()), seed
    )
    return Case(config, vocabulary, shares, batch, seed)


def selections(record) -> list[set[int]]:
    """Return the tokens that each expert of a router selected."""
    return [set(each.nonzero().flatten().tolist()) for each in record.selected_NE.T]


def assert_equals_reference(case: Case, how: str) -> None:
    model = case.build()
    tokens, documents, positions = case.batch
    output = model(*map(torch.from_numpy, case.batch), routing=ROUTINGS[how])
    choices = [selections(record) for record in output.routers]
    expected = slow_model(model, tokens, documents, positions, how, choices)
    real = tokens.flatten() != case.vocabulary.padding
    found = numpy(output.head.flatten(0, 1))
    # Rotary angles are computed in fp32.
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(sorted(ROUTINGS)))
def test_the_whole_model_equals_a_slow_reference(case, how):
    assert_equals_reference(case, how)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(cases(), st.sampled_from(sorted(ROUTINGS)))
def test_the_whole_model_equals_a_slow_reference_in_many_cases(case, how):
    assert_equals_reference(case, how)
