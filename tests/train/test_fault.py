"""Faults in training: the message, the saved files and the replay."""

import json
import math

import pytest
import torch

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.model.depth import DepthConfig
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.world import World
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.replay import replay
from moma.train.step import LossOutput, Step
from moma.vocabulary import Vocabulary

WORLD = World(torch.device("cpu"))
FAULTY_STEP = 3  # between two log records


def before_step(monkeypatch: pytest.MonkeyPatch, change) -> None:
    """Change the third step, and no later one, also not after a restart."""
    real, taken = Step.__call__, 0

    def step(self, *arguments):
        nonlocal taken
        taken += 1
        if taken != FAULTY_STEP:
            return real(self, *arguments)
        loss_function = self.loss_function
        change(self)
        try:
            return real(self, *arguments)
        finally:
            self.loss_function = loss_function

    monkeypatch.setattr(Step, "__call__", step)


def set_nan(name: str):
    """A weight that is NaN, and with it everything that is computed from it."""

    def change(step: Step) -> None:
        with torch.no_grad():
            step.model.get_parameter(name).fill_(torch.nan)

    return change


def with_losses(changed):
    """Change a step's losses."""

    def change(step: Step) -> None:
        real = step.loss_function
        step.loss_function = lambda model, batch: changed(real(model, batch))

    return change


def of_groups(tiny: Recipe, groups: str, path, **changes) -> Recipe:
    model = tiny.model.model_copy(update={"groups": groups})
    stage = tiny.pretrain.model_copy(update=changes)
    return tiny.model_copy(update={"run": path, "model": model, "pretrain": stage})


@pytest.mark.parametrize(
    ("groups", "broken", "named"),
    [
        ("dense", "layers.1.attention.output.weight", "the output of layer 1, or"),
        ("moe_1t1i", "layers.1.experts.groups.0.gate", "the output of layer 1, or"),
        ("moe_2t2i", "layers.0.experts_norm.weight", "the output of layer 0, or"),
        ("moe_2t2i", "head.weight", "the loss is not finite, though the outputs"),
    ],
)
def test_the_first_nonfinite_part_is_named(tiny, tmp_path, monkeypatch, groups, broken, named):
    before_step(monkeypatch, set_nan(broken))
    with pytest.raises(UserError, match=rf"at step 3 {named}.* pretrain\.on_fault=skip"):
        train(of_groups(tiny, groups, tmp_path / "run"), WORLD, quiet=True)
    fault = json.loads((tmp_path / "run/fault/fault.json").read_text())
    assert fault["step"] == FAULTY_STEP and fault["checkpoint"] is None
    assert fault["layers"][:1] == ([int(broken[7])] if broken.startswith("layers") else [])
    assert fault["loss"] == "nan" == fault["gradient_norm"]


def test_a_nonfinite_gradient_is_reported(tiny, tmp_path, monkeypatch):
    infinite = with_losses(lambda losses: losses._replace(objective=losses.objective * math.inf))
    before_step(monkeypatch, infinite)
    with pytest.raises(UserError, match="at step 3 the gradient is not finite, though the loss is"):
        train(of_groups(tiny, "moe_2t2i", tmp_path / "run"), WORLD, quiet=True)
    assert json.loads((tmp_path / "run/fault/fault.json").read_text())["loss"] < 10


def nonfinite(losses: LossOutput) -> LossOutput:
    """As with an infinite router logit, after which the loss may still be finite."""
    return losses._replace(nonfinite_L=torch.tensor([False, True]))


def test_nonfinite_logits_follow_on_fault(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before_step(patch, with_losses(nonfinite))
        with pytest.raises(UserError, match="at step 3 the output of layer 1, or a logit"):
            train(of_groups(tiny, "moe_2t2i", tmp_path / "stop"), WORLD, quiet=True)
    fault = json.loads((tmp_path / "stop/fault/fault.json").read_text())
    assert (fault["step"], fault["layers"]) == (FAULTY_STEP, [1]) and fault["loss"] < 10
    before_step(monkeypatch, with_losses(nonfinite))
    run = train(of_groups(tiny, "moe_2t2i", tmp_path / "skip", on_fault="skip"), WORLD, quiet=True)
    assert [record["skipped_steps"] for record in run.read_metrics()] == [0, 1, 1, 1]


def test_the_message_names_the_key_of_the_stage(tiny, tiny_run, tmp_path, monkeypatch):
    changes = {"stage": "aux_router", "from_": tiny_run.path, "run": tmp_path / "routers"}
    before_step(monkeypatch, with_losses(nonfinite))
    with pytest.raises(UserError, match=r"aux_router\.on_fault=skip .* in a new run avoids"):
        train(tiny.model_copy(update=changes), WORLD, quiet=True)


@pytest.mark.parametrize("broken", ["layers.1.depth.router", "layers.2.experts.groups.0.router"])
def test_nonfinite_logits_stop_and_name_the_layer(tiny, tmp_path, monkeypatch, broken):
    changes = {"groups": "mod_moe_2t2i", "layers": 4, "depth": DepthConfig(layers=(1, 3))}
    recipe = tiny.model_copy(
        update={"model": tiny.model.model_copy(update=changes), "run": tmp_path / "run"}
    )
    before_step(monkeypatch, set_nan(f"{broken}.weight"))
    layer = broken.split(".")[1]
    with pytest.raises(UserError, match=f"at step 3 the output of layer {layer}, or a logit"):
        train(recipe, WORLD, quiet=True)
    run = Run(tmp_path / "run")
    assert [record["step"] for record in run.read_metrics()] == [2]
    assert not checkpoints_in(run.checkpoints)


def exploding(tiny: Recipe, path, **changes) -> Recipe:
    optimizer = tiny.pretrain.optimizer.model_copy(update={"learning_rate": 1e3, "warmup": 5})
    stage = tiny.pretrain.model_copy(update={"optimizer": optimizer, "explosion": 2.0} | changes)
    return tiny.model_copy(update={"run": path, "pretrain": stage})


def test_an_explosion_stops_and_can_be_replayed(tiny, tmp_path):
    recipe = exploding(tiny, tmp_path / "run")
    with pytest.raises(UserError, match=r"at step \d+ the loss .* explodes.*moma replay"):
        train(recipe, WORLD, quiet=True)
    run = Run(recipe.run)
    fault = json.loads((run.path / "fault" / "fault.json").read_text())
    assert 1 < fault["step"] <= 8 and fault["loss"] > 0 and fault["layers"] == []
    data = Batches(tiny.data, Vocabulary.load(run.tokenizers.vocabulary), tiny.seed)
    *_, expected = (next(data) for _ in range(fault["step"]))
    saved = json.loads((run.path / "fault" / "rank-0.json").read_text())["documents"]
    assert saved == [[[list(piece) for piece in sequence] for sequence in expected.origins]]
    # Whoever can read one file can read all.
    assert len({file.stat().st_mode for file in (run.path / "fault").iterdir()}) == 1
    found = replay(run, WORLD, quiet=True)
    assert found["step"] == fault["step"] and found["same_batches"]
    (batch,) = found["micro_batches"]
    worst = max(batch["loss_text"], batch["loss_image"])
    assert worst > 2 * found["loss_before"] and len(found["gradients"]) == 5
    shown = {(source, number) for source, own in batch["documents"].items() for number in own}
    # Numbers for `moma data inspect --document`, which count from 1.
    assert shown == {(name, row + 1) for sequence in expected.origins for name, row in sequence}
    with pytest.raises(
        UserError, match=f"at step {fault['step']} "
    ):  # no checkpoint follows the fault
        train(recipe, WORLD, quiet=True)
    # This key may change on resume; such steps are skipped from now on.
    skipping = exploding(tiny, tmp_path / "run", on_fault="skip")
    try:
        train(skipping, WORLD, quiet=True)
    except UserError as error:
        assert "consecutive steps were skipped" in str(error)
    else:
        assert run.read_metrics()[-1]["skipped_steps"] > 0


def test_a_replay_needs_an_intact_checkpoint(tiny, tmp_path, monkeypatch):
    before_step(monkeypatch, set_nan("head.weight"))
    recipe = of_groups(tiny, "moe_2t2i", tmp_path / "a run", checkpoint_every=2)
    with pytest.raises(UserError, match=r"`moma replay '\S+/a run'` shows where"):
        train(recipe, WORLD, quiet=True)
    run = Run(recipe.run)
    (checkpoint,) = checkpoints_in(run.checkpoints)
    (shard,) = (checkpoint / "tensors").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"step-00000002/tensors/.* has changed .*restore it"):
        replay(run, WORLD)


def test_a_run_without_a_fault_cannot_be_replayed(tiny_run):
    with pytest.raises(UserError, match="has no saved fault"):
        replay(tiny_run, WORLD)
