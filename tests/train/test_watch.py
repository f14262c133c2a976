"""The watch against a slow reference; steps that are skipped leave no trace."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.model.transformer import Transformer
from moma.runtime.optimizer import make_optimizer
from moma.runtime.world import World
from moma.train.recipe import StageConfig
from moma.train.step import DeviceBatch, Losses, Step, next_token_objective
from moma.train.watch import LossMonitor
from moma.vocabulary import Vocabulary

CPU = torch.device("cpu")
SOUND = torch.zeros(2, dtype=torch.bool)
VALUES = st.floats(0.125, 64, width=32) | st.sampled_from([math.nan, math.inf])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), max_size=12), st.sampled_from([0.0, 2.0, 5.0]))
def test_judges_as_a_slow_reference(steps, explosion):
    watch = LossMonitor(StageConfig(explosion=explosion), CPU)
    mean, first = None, 0
    for number, (loss, norm) in enumerate(steps, 1):
        watch.begin(number)
        judged = bool(watch.judge(torch.tensor(loss), torch.tensor(norm), SOUND))
        sound = math.isfinite(loss) and math.isfinite(norm)
        if sound and explosion and mean is not None and loss > explosion * mean:
            sound = abs(loss - explosion * mean) < 1e-4 * loss and judged  # rounding
        assert judged == sound
        if sound:
            mean = loss if mean is None else mean + 0.02 * (loss - mean)
        elif not first:
            first = number
    assert int(watch.evidence["first"]) == first
    state = watch.get_state()
    assert (state["mean"] is None) == (mean is None)
    again = LossMonitor(StageConfig(explosion=explosion), CPU)
    again.set_state(state)
    assert again.get_state() == state


def test_skipping_is_counted_and_has_an_end():
    watch = LossMonitor(StageConfig(on_fault="skip"), CPU)
    sound, fault = torch.tensor(True), torch.tensor(False)
    assert not watch.refuses(sound)
    for _ in range(9):
        assert watch.refuses(fault)
    assert not watch.refuses(sound)
    for _ in range(9):
        assert watch.refuses(fault)
    assert watch.skipped == 18
    with pytest.raises(UserError, match="10 steps in a row were skipped"):
        watch.refuses(fault)
    assert not LossMonitor(StageConfig(), CPU).refuses(fault)


def test_a_skipped_step_changes_nothing(tiny):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    model = tiny.build_model(vocabulary)
    for router in model.auxiliary_routers():
        router.requires_grad_(False)
    factor = 1.0

    def objective(model: Transformer, batch: DeviceBatch) -> Losses:
        losses = next_token_objective(0.0, compiled=False)(model, batch)
        return losses._replace(objective=losses.objective * factor)

    optimizer = make_optimizer(model, tiny.pretrain.optimizer)
    watch = LossMonitor(StageConfig(on_fault="skip"), CPU)
    step = Step(model, optimizer, objective, 1.0, World(CPU), watch)
    data = Batches(tiny.data, vocabulary, seed=0)
    step([next(data)], 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in optimizer.state}
    factor = math.nan  # the gradient, not the loss that is told
    sums, _ = step([next(data)], 1e-3)
    assert not sums.any() and watch.skipped == 1
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None
    for parameter, old in moments.items():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], old)
    factor = 1.0
    step([next(data)], 1e-3)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
