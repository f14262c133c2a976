"""Held-out losses during training: equal to `moma evaluate`, and without effect on the run."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from moma.data.batches.iterator import Batches
from moma.data.encode.prepare import prepare
from moma.errors import UserError
from moma.evaluate.perplexity import evaluate
from moma.model.attention_kernels import MaskedAttention
from moma.recipe import read_recipe
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.sharding import local_part
from moma.runtime.world import World
from moma.runtime.writer import CheckpointWriter
from moma.train.loop import train
from moma.train.metrics import TIMING_KEYS
from moma.train.recipe import Recipe, ValidationConfig
from moma.train.restore import load_run
from moma.train.stages import make_step, prepare_model
from moma.train.validation import Validation
from moma.vocabulary import Vocabulary
from tests.factories import write_minimal_recipe
from tests.processes import on_ranks

WORLD = World(torch.device("cpu"))
ALL = 1000  # more micro-batches than are held out
# The test of each key, which fails if the key is ignored.
TESTS = {
    "every": "test_losses_are_those_of_evaluate",
    "batches": "test_batches_limits_the_micro_batches",
    "keep_best": "test_the_best_checkpoint_is_kept",
    "prompts": "test_an_image_is_generated_for_each_prompt",
}


def with_validation(recipe: Recipe, run: Path, **changes) -> Recipe:
    config = ValidationConfig.model_validate({"every": 2, "batches": ALL} | changes)
    return recipe.model_copy(update={"run": run, "validation": config})


def records_of(run: Path) -> list[dict]:
    records = Run(run).read_metrics()
    return [{k: v for k, v in each.items() if k not in TIMING_KEYS} for each in records]


def test_every_key_has_a_test():
    assert TESTS.keys() == ValidationConfig.model_fields.keys()
    assert all(name in globals() for name in TESTS.values())


def test_losses_are_those_of_evaluate(tiny, tmp_path):
    recipe = with_validation(tiny, tmp_path / "run")
    train(recipe, WORLD, quiet=True)
    records = records_of(recipe.run)
    assert all("validation" in record for record in records)
    model, _ = load_run(Run(recipe.run))
    found = records[-1]["validation"]
    assert found.keys() == {"choice", "causal", "gap"}
    for name, gap in found["gap"].items():
        assert gap == found["causal"][name] - found["choice"][name] != 0
    for routing in ("choice", "causal"):
        expected = evaluate(model, recipe, routing, quiet=True)
        for name in ("loss", "loss_text", "loss_image"):
            assert found[routing][name] == pytest.approx(expected[name], rel=1e-5)
    assert found["choice"] != found["causal"]


def test_routers_in_training_are_validated_too(tiny, tmp_path):
    train(tiny.model_copy(update={"run": tmp_path / "run"}), WORLD, quiet=True)
    routers = with_validation(tiny, tmp_path / "run" / "aux_router").model_copy(
        update={"stage": "aux_router", "from_": tmp_path / "run"}
    )
    train(routers, WORLD, quiet=True)
    found = records_of(routers.run)[-1]["validation"]
    model, _ = load_run(Run(tmp_path / "run"))
    assert found.keys() == {"choice", "auxiliary", "gap"}
    for routing in ("choice", "auxiliary"):
        expected = evaluate(model, routers, routing, quiet=True)
        assert found[routing]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["choice"] != found["auxiliary"]


class TrainingAttention(MaskedAttention):
    """Would be compiled for every shape."""

    is_compiled = True

    def layout(self, segments, dtype):
        assert torch.is_grad_enabled(), "used in validation"
        return super().layout(segments, dtype)


def test_no_kernel_is_compiled_for_validation(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "attention_kernel", lambda *_, **__: TrainingAttention())
    recipe = with_validation(tiny, tmp_path / "run")
    train(recipe, WORLD, quiet=True)
    assert "validation" in records_of(recipe.run)[-1]


def test_validation_and_interruption_change_nothing_else(tiny, tmp_path):
    plain = tiny.model_copy(update={"run": tmp_path / "plain"})
    recipe = with_validation(tiny, tmp_path / "run", keep_best="loss")
    train(plain, WORLD, quiet=True)
    train(recipe, WORLD, quiet=True)
    without = [
        {k: v for k, v in each.items() if k != "validation"} for each in records_of(recipe.run)
    ]
    assert without == records_of(plain.run)
    whole = records_of(recipe.run)
    last = checkpoints_in(Run(recipe.run).checkpoints)[-1]
    last.rename(last.with_suffix(".away"))  # as if it had been interrupted before
    train(recipe, WORLD, quiet=True)
    assert records_of(recipe.run) == whole


def test_validation_waits_for_the_checkpoint_whose_thread_shares_its_process_group(
    tiny, tmp_path, monkeypatch
):
    events = []

    def recording(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def call(self, *arguments):
            events.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(owner, name, call)

    recording(CheckpointWriter, "save")
    recording(CheckpointWriter, "wait")
    recording(Validation, "measure")
    train(with_validation(tiny, tmp_path / "run"), WORLD, quiet=True)
    assert "measure" in events[events.index("save") :]
    for number, event in enumerate(events):
        if event == "measure":
            assert events[number - 1] == "wait"


@pytest.mark.slow
def test_a_compiled_model_is_validated_without_compiling_again(tiny, tmp_path):
    stage = tiny.pretrain.model_copy(update={"compile": True})
    compiled = tiny.model_copy(update={"pretrain": stage})
    train(with_validation(compiled, tmp_path / "compiled"), WORLD, quiet=True)
    train(with_validation(tiny, tmp_path / "eager"), WORLD, quiet=True)
    for name in ("loss", "loss_text", "loss_image"):
        one, other = (
            [each["validation"]["choice"][name] for each in records_of(tmp_path / run)]
            for run in ("compiled", "eager")
        )
        assert one == pytest.approx(other, rel=1e-3)


def test_batches_limits_the_micro_batches(tiny, tmp_path):
    losses = []
    for batches in (1, ALL):
        recipe = with_validation(tiny, tmp_path / str(batches), batches=batches)
        train(recipe, WORLD, quiet=True)
        losses.append(records_of(recipe.run)[-1]["validation"]["choice"]["loss"])
    assert losses[0] != losses[1]


def test_the_best_checkpoint_is_kept(tiny, tmp_path):
    # The learning rate rises until it ruins the model.
    optimizer = tiny.pretrain.optimizer.model_copy(update={"learning_rate": 3.0, "warmup": 7})
    stage = tiny.pretrain.model_copy(
        update={
            "optimizer": optimizer,
            "checkpoint_every": 2,
            "keep_checkpoints": 1,
            "explosion": 0,
        }
    )
    recipe = tiny.model_copy(update={"pretrain": stage})
    recipe = with_validation(recipe, tmp_path / "run", keep_best="loss_text")
    train(recipe, WORLD, quiet=True)
    losses = {
        each["step"]: each["validation"]["causal"]["loss_text"] for each in records_of(recipe.run)
    }
    best = min(losses, key=lambda step: losses[step])
    assert best < recipe.pretrain.steps
    folder = Run(recipe.run).checkpoints
    names = {path.name for path in checkpoints_in(folder)}
    assert names == {f"step-{best:08d}", f"step-{recipe.pretrain.steps:08d}"}
    assert (folder / "best").read_text().strip() == f"step-{best:08d}"


def test_an_image_is_generated_for_each_prompt(tiny, tmp_path):
    model = tiny.model.model_copy(update={"groups": "moe_1t1i"})
    recipe = tiny.model_copy(update={"model": model})
    recipe = with_validation(recipe, tmp_path / "run", prompts=("a", "a red square"))
    train(recipe, WORLD, quiet=True)
    sheets = sorted((recipe.run / "validation").iterdir())
    assert [path.name for path in sheets] == [
        f"step-{each['step']:08d}.png" for each in records_of(recipe.run)
    ]
    side = recipe.codec.image_size
    with Image.open(sheets[0]) as sheet:
        assert sheet.width > 2 * side and side < sheet.height < 2 * side


def measure(world: World, recipe: Recipe, out: Path) -> None:
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, world)
    validation = Validation(recipe, model, world, out)
    losses = validation.measure(1)
    assert model.training
    # The model can be trained afterwards.
    data = Batches(recipe.data, vocabulary, recipe.seed, world.rank, world.size)
    make_step(recipe, model, world)([next(data)], 1e-2)
    if world.rank == 1:  # a rank whose values are not finite does not leave the others
        with torch.no_grad():
            local_part(model.norm.weight).fill_(torch.nan)
    without_fault = validation.measure(2)
    if world.rank == 0:
        (out / f"{world.size}.json").write_text(json.dumps([losses, without_fault]))


@pytest.mark.parametrize(("groups", "batches"), [("moe_1t1i", 3), ("mod_moe_2t2i", ALL)])
def test_two_ranks_measure_what_one_does(tiny, tmp_path, groups, batches):
    model = tiny.model.model_copy(update={"groups": groups})
    recipe = tiny.model_copy(update={"model": model})
    recipe = with_validation(recipe, tmp_path / "run", batches=batches, prompts=("a",))
    measure(WORLD, recipe, tmp_path)
    on_ranks(2, measure, recipe, tmp_path)
    (one, _), (two, broken) = (
        json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2)
    )
    assert two["choice"] == pytest.approx(one["choice"], rel=1e-5)
    assert broken["choice"]["loss"] is None
    assert ("causal" in one) == (groups == "mod_moe_2t2i") and one.keys() == two.keys()
    assert list(two.values())[-1] == pytest.approx(list(one.values())[-1], rel=1e-5)
    assert (tmp_path / "step-00000001.png").is_file()


def best_of(tiny: Recipe, folder: Path, **changes) -> Validation:
    recipe = with_validation(tiny, folder / "run", **{"keep_best": "loss"} | changes)
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, WORLD)
    return Validation(recipe, model, WORLD, folder)


def test_the_best_loss_is_forgotten_when_another_is_measured(tiny, tmp_path):
    first = best_of(tiny, tmp_path)
    first.measure(2)
    assert first.best_step(2) == 2
    same, other = (
        best_of(tiny, tmp_path, **changes) for changes in ({}, {"keep_best": "loss_image"})
    )
    for validation in (same, other):
        validation.set_state(json.loads(json.dumps(first.get_state())))
    assert same.best_step(4) == 2 and other.best_step(4) is None


def test_a_prompt_without_space_for_an_image_is_refused(tiny, tmp_path):
    model = tiny.model.model_copy(update={"groups": "moe_1t1i"})
    recipe = tiny.model_copy(update={"model": model})
    with pytest.raises(UserError, match=r"validation.prompts: 'a a .* tokens.* shorten it"):
        train(with_validation(recipe, tmp_path / "run", prompts=("a " * 99,)), WORLD, quiet=True)
    assert not (tmp_path / "run").exists()


def test_data_without_held_out_documents_is_refused(tiny, tmp_path):
    data = tiny.data.model_copy(update={"path": tmp_path / "data", "held_out": 0.0})
    recipe = tiny.model_copy(update={"data": data})
    prepare(recipe, torch.device("cpu"), quiet=True)
    with pytest.raises(UserError, match="holds no documents out"):
        train(with_validation(recipe, tmp_path / "run"), WORLD, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("validation.every=3", "multiple of pretrain.log_every"),
        ('validation.prompts=["a"]', "prompts need validation.every"),
        ("validation.keep_best=loss", "must be a multiple of validation.every"),
    ],
)
def test_intervals_that_do_not_fit_are_refused(tmp_path, change, message):
    path = write_minimal_recipe(tmp_path)
    with pytest.raises(UserError, match=message):
        read_recipe(Recipe, path, ["pretrain.log_every=2", "pretrain.checkpoint_every=4", change])
