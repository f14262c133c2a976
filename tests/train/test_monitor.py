"""The loss monitor against a slow reference; skipped steps change nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.model.transformer import Transformer
from moma.runtime.optimizer import make_optimizers
from moma.runtime.world import World
from moma.train.monitor import LossMonitor
from moma.train.recipe import StageConfig
from moma.train.step import DeviceBatch, LossOutput, Step, next_token_loss
from moma.vocabulary import Vocabulary

CPU = torch.device("cpu")
NONE_NONFINITE = torch.zeros(2, dtype=torch.bool)
VALUES = st.floats(0.125, 64, width=32) | st.sampled_from([math.nan, math.inf])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), max_size=12), st.sampled_from([0.0, 2.0, 5.0]))
def test_check_equals_a_slow_reference(steps, explosion):
    monitor = LossMonitor(StageConfig(explosion=explosion), CPU)
    mean, first = None, 0
    for number, (loss, norm) in enumerate(steps, 1):
        monitor.begin_step(number)
        ok = bool(monitor.check(torch.tensor(loss), torch.tensor(norm), NONE_NONFINITE))
        expected = math.isfinite(loss) and math.isfinite(norm)
        if expected and explosion and mean is not None and loss > explosion * mean:
            expected = abs(loss - explosion * mean) < 1e-4 * loss and ok  # rounding
        assert ok == expected
        if expected:
            mean = loss if mean is None else mean + 0.02 * (loss - mean)
        elif not first:
            first = number
    assert int(monitor.first_fault["fault_step"]) == first
    state = monitor.get_state()
    assert (state["mean_loss"] is None) == (mean is None)
    again = LossMonitor(StageConfig(explosion=explosion), CPU)
    again.set_state(state)
    assert again.get_state() == state


def test_skipped_steps_are_counted_and_limited():
    monitor = LossMonitor(StageConfig(on_fault="skip"), CPU)
    expected, fault = torch.tensor(True), torch.tensor(False)
    assert not monitor.should_skip(expected)
    for _ in range(9):
        assert monitor.should_skip(fault)
    assert not monitor.should_skip(expected)
    for _ in range(9):
        assert monitor.should_skip(fault)
    assert monitor.skipped_steps == 18
    with pytest.raises(UserError, match="10 consecutive steps were skipped"):
        monitor.should_skip(fault)
    assert not LossMonitor(StageConfig(), CPU).should_skip(fault)


def test_a_skipped_step_changes_nothing(tiny):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    # Its depth routers have cutoffs, and its experts' routers biases, which a step moves, too.
    config = tiny.model.model_copy(update={"groups": "mod_token_2t2i"})
    model = tiny.model_copy(update={"model": config}).build_model(vocabulary)
    for router in model.auxiliary_routers():
        router.requires_grad_(False)
    factor = 1.0

    def loss_function(model: Transformer, batch: DeviceBatch) -> LossOutput:
        losses = next_token_loss(0.0, compiled=False)(model, batch)
        return losses._replace(objective=losses.objective * factor)

    (optimizer,) = make_optimizers(model, tiny.pretrain.optimizer)
    monitor = LossMonitor(StageConfig(on_fault="skip"), CPU)
    step = Step(model, [optimizer], loss_function, 1.0, World(CPU), monitor)
    data = Batches(tiny.data, vocabulary, seed=0)
    step([next(data)], 1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kind in ("cutoff_means_3E", "bias_O"):
        assert any(value.any() for name, value in before.items() if name.endswith(kind))
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in optimizer.state}
    factor = math.nan  # makes the gradient non-finite, not the reported loss
    sums, _ = step([next(data)], 1e-3)
    assert not sums.any() and monitor.skipped_steps == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    for parameter, old in moments.items():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], old)
    factor = 1.0
    step([next(data)], 1e-3)
    assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
