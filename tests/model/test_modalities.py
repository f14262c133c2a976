"""Three modalities are routed and trained like two."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.data.batches.packing import Batch
from moma.errors import UserError
from moma.model.architecture import ModelConfig
from moma.model.depth import DepthConfig
from moma.model.experts import MixtureOfExperts
from moma.model.implementations import build_group
from moma.model.routing import Auxiliary, ExpertChoice, Routing, uniform_routing
from moma.model.transformer import Transformer
from moma.runtime.optimizer import OptimizerConfig, make_optimizers
from moma.runtime.world import World
from moma.train.stages import freeze_for_stage
from moma.train.step import DeviceBatch, Step, next_token_loss, router_loss
from tests.model.model_reference import feed_forward, groups_of, numpy
from tests.model.three_modalities import GROUPS, NAMES, SHARES, VOCABULARY, group

ACTUAL = uniform_routing(ExpertChoice("actual"))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(GROUPS),
    st.lists(st.sampled_from([0, 1, 2, -1]), min_size=1, max_size=16),
    st.sampled_from(["actual", "causal"]),
    st.integers(0, 99),
)
def test_groups_equal_a_slow_reference(groups, modality, how, seed):
    torch.manual_seed(seed)
    experts = MixtureOfExperts([build_group(6, 5, each, SHARES, NAMES) for each in groups]).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(1, len(modality), 6, dtype=torch.float64)
    routing = uniform_routing(Auxiliary()) if how == "causal" else ACTUAL
    y, _ = experts(x, torch.tensor([modality]), routing)
    parts = groups_of(experts.groups, groups, SHARES, NAMES, how, len(modality))
    expected = feed_forward(parts, numpy(x[0]), modality)
    real = np.array(modality) >= 0  # a dense group also computes padding
    np.testing.assert_allclose(numpy(y[0])[real], expected[real], atol=1e-9)


def batch_of(counts) -> DeviceBatch:
    """Return two sequences of 16 tokens, `counts` of each modality."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat(
        [
            torch.randint(3 if m == 0 else 10 * m, 10 * m + 10, (count,), generator=generator)
            for m, count in enumerate(counts)
        ]
    )
    tokens = ids[torch.randperm(32, generator=generator)].view(2, 16)
    return DeviceBatch(
        tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), torch.arange(16).expand(2, 16)
    )


@pytest.mark.parametrize("groups", GROUPS)
def test_static_capacity_equals_actual_where_the_batch_has_the_shares(groups):
    model = Transformer(ModelConfig(groups=groups, dim=16, layers=2, heads=2), VOCABULARY, SHARES)
    model.initialize(0)
    batch = batch_of((16, 8, 8))
    static, actual = (model(batch.tokens_BS, routing=routing) for routing in (Routing(), ACTUAL))
    assert torch.equal(static.head, actual.head)
    skewed = batch_of((24, 4, 4))
    static, actual = (model(skewed.tokens_BS, routing=routing) for routing in (Routing(), ACTUAL))
    if any(each.experts > 1 for each in groups) and len(groups) > 1:
        assert not torch.equal(static.head, actual.head)


def test_both_objectives_have_three_losses():
    config = ModelConfig(
        groups=GROUPS[0], dim=16, layers=2, heads=2, depth=DepthConfig(capacity_factor=0.5)
    )
    model = Transformer(config, VOCABULARY, SHARES)
    model.initialize(0)
    batch = batch_of((16, 8, 8))
    losses = next_token_loss(0.0, compiled=False)(model, batch)
    assert losses.targets_M.tolist() == [16, 8, 8]
    losses.objective.backward()
    losses = router_loss(model, batch)
    # Two layers of 2 and 3 routed experts; the first has a depth router and half the tokens.
    depth, full = torch.tensor([16.0, 8, 8]), torch.tensor([2 * 16, 3 * 8, 0])
    assert losses.targets_M[2] == depth[2]
    assert (losses.targets_M >= depth + full).all()
    assert (losses.loss_M > 0).all()


@pytest.mark.parametrize("groups", GROUPS)
def test_training_lowers_the_loss_of_every_modality(groups):
    config = ModelConfig(
        groups=groups, dim=16, layers=2, heads=2, depth=DepthConfig(capacity_factor=0.5)
    )
    model = Transformer(config, VOCABULARY, SHARES)
    model.initialize(0)
    freeze_for_stage(model, trains_routers=False)
    optimizers = make_optimizers(model, OptimizerConfig())
    step = Step(model, optimizers, next_token_loss(0.0, False), 1.0, World(torch.device("cpu")))
    tokens, labels, documents, positions = (part.numpy() for part in batch_of((16, 8, 8))[:4])
    batch = Batch(tokens, labels, documents, positions, images=0, padding=0)
    losses = [step([batch], learning_rate=3e-3)[0][0] for _ in range(30)]
    assert (losses[-1] < 0.5 * losses[0]).all()


def test_a_modality_that_the_vocabulary_lacks_is_named():
    with pytest.raises(UserError, match="'smell'; the modalities are text, image, audio"):
        build_group(6, 5, group("text smell", 2), SHARES, NAMES)
    with pytest.raises(ValueError, match="each modality once"):
        group("text text", 2)
