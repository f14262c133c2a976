"""Runs: exact resume, frozen parameters, golden losses, refused recipes."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import moma
from moma.data.encode.prepare import prepare
from moma.errors import StorageError, UserError
from moma.model.depth import DepthConfig
from moma.model.routing import ROUTINGS, Half
from moma.runs import Run, Tokenizers
from moma.runtime import checkpoint
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.tracking import MetricsLog
from moma.runtime.world import World
from moma.train import loop
from moma.train.loop import resume_seed, train
from moma.train.metrics import TIMING_KEYS, MetricsWindow
from moma.train.recipe import Recipe
from moma.train.restore import (
    ROUTER_RUN,
    load_run,
    require_routing,
    require_training_data,
    run_to_load,
)

WORLD = World(torch.device("cpu"))
# Text and image loss of the logged steps; they depend on the order of the documents.
GOLDEN = [(5.9043, 6.3093), (5.1822, 4.6095), (4.7599, 3.6004), (4.7293, 3.3887)]
KEYS = {
    "step", "tokens", "flops", "loss", "loss_text", "loss_image", "learning_rate",
    "gradient_norm", "tokens_per_second",
}  # fmt: skip


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in (checkpoint / "tensors").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def assert_same_run(one: Run, other: Run) -> None:
    """Weights, optimizer and log are equal bit for bit, except for timings."""
    first, second = (tensors_of(checkpoints_in(run.checkpoints)[-1]) for run in (one, other))
    assert first.keys() == second.keys() and any("exp_avg" in key for key in first)
    for key in first:
        assert torch.equal(first[key], second[key]), key
    records, others = (
        [{k: v for k, v in record.items() if k not in TIMING_KEYS} for record in run.read_metrics()]
        for run in (one, other)
    )
    assert records == others


class KilledError(Exception):
    pass


def kill_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let a run end in the middle of a step, after `steps` complete ones."""
    real = MetricsWindow.start_record
    calls = 0

    def start_record(self, *arguments):
        nonlocal calls
        calls += 1
        if calls > steps:
            raise KilledError
        return real(self, *arguments)

    monkeypatch.setattr(MetricsWindow, "start_record", start_record)


def copy_of(run: Run, path: Path) -> Run:
    shutil.copytree(run.path, path)
    return Run(path)


def with_run(recipe: Recipe, path: Path, **changes) -> Recipe:
    return recipe.model_copy(update={"run": path, **changes})


@pytest.mark.parametrize(
    "killed_after",  # before and after the first checkpoint
    [1, 3, *(pytest.param(records, marks=pytest.mark.slow) for records in (0, 2))],
)
def test_interrupted_run_equals_uninterrupted(tiny, tiny_run, tmp_path, monkeypatch, killed_after):
    recipe = with_run(tiny, tmp_path / "interrupted")
    with monkeypatch.context() as patch:
        kill_after(patch, killed_after)
        with pytest.raises(KilledError):
            train(recipe, WORLD, quiet=True)
    torch.manual_seed(killed_after)  # earlier random numbers of the process must not matter
    resumed = train(recipe, WORLD, quiet=True)
    assert_same_run(tiny_run, resumed)
    assert [record["step"] for record in resumed.read_metrics()] == [2, 4, 6, 8]
    assert set(resumed.read_metrics()[0]) >= KEYS


@pytest.mark.parametrize("groups", ["mod_moe_2t2i", "mod_token_2t2i"])
def test_dropout_after_an_interruption_equals_uninterrupted(tiny, tmp_path, monkeypatch, groups):
    changes = {"groups": groups, "dropout": 0.2, "router_noise": "token" in groups}
    recipe = tiny.model_copy(update={"model": tiny.model.model_copy(update=changes)})
    expected = train(with_run(recipe, tmp_path / "uninterrupted"), WORLD, quiet=True)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(KilledError):
            train(with_run(recipe, tmp_path / "interrupted"), WORLD, quiet=True)
    torch.manual_seed(5)
    assert_same_run(expected, train(with_run(recipe, tmp_path / "interrupted"), WORLD, quiet=True))


def test_seeds_differ_between_ranks_and_steps():
    """Also from the seeds at the start of a run, which are those of the ranks."""
    seeds = {resume_seed(0, step, rank) for step in range(50) for rank in range(8)}
    assert len(seeds) == 400 and not seeds & set(range(8))


def test_an_unwritable_log_stops_the_run(tiny, tmp_path, monkeypatch):
    """No checkpoint is written without its log."""

    def write(self, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsLog, "write", write)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot write \(No space"):
        train(with_run(tiny, tmp_path / "run"), WORLD, quiet=True)
    assert not checkpoints_in(Run(tmp_path / "run").checkpoints)


def test_an_unfinished_checkpoint_is_not_used(tiny, tiny_run, tmp_path):
    recipe = with_run(tiny, tmp_path / "run")
    run = copy_of(tiny_run, recipe.run)
    newest = checkpoints_in(run.checkpoints)[-1]
    newest.rename(newest.with_suffix(".partial"))
    assert [path.name for path in checkpoints_in(run.checkpoints)] == ["step-00000004"]
    train(recipe, WORLD, quiet=True)
    assert [record["step"] for record in run.read_metrics()] == [2, 4, 6, 8]


def test_golden_losses(tiny_run):
    """Guards training from documents to losses; change the numbers only for a documented reason.

    The tolerance leaves room for another processor's rounding, which may change an image's codes.
    """
    losses = [(record["loss_text"], record["loss_image"]) for record in tiny_run.read_metrics()]
    for (text, image), (golden_text, golden_image) in zip(losses, GOLDEN, strict=True):
        assert text == pytest.approx(golden_text, abs=0.02)
        assert image == pytest.approx(golden_image, abs=0.02)


def test_auxiliary_routers_are_trained_beside_the_model(tiny, tmp_path):
    """They do not change it, unless the norm of all gradients is limited."""
    model = tiny.model.model_copy(update={"groups": "mod_moe_2t2i"})
    optimizer = tiny.pretrain.optimizer.model_copy(update={"clip": 1e9})
    runs = []
    for joint in (False, True):
        changes = {"auxiliary_routers": joint, "optimizer": optimizer}
        stage = tiny.pretrain.model_copy(update=changes)
        recipe = with_run(tiny, tmp_path / f"{joint}", model=model, pretrain=stage)
        runs.append(train(recipe, WORLD, quiet=True))
    before, after = (tensors_of(checkpoints_in(run.checkpoints)[-1]) for run in runs)
    for key in before:
        if key.startswith("model."):
            assert torch.equal(before[key], after[key]) == ("auxiliary" not in key), key
    records = [run.read_metrics() for run in runs]
    assert [each["loss"] for each in records[0]] == [each["loss"] for each in records[1]]
    assert records[1][-1]["flops"] > records[0][-1]["flops"]
    agreement = [
        [router["agreement"] for router in record["routers"].values()] for record in records[1]
    ]
    assert np.mean(agreement[-1]) > np.mean(agreement[0])
    plain, joint_model = (load_run(run)[0] for run in runs)
    with pytest.raises(UserError, match="not trained"):
        require_routing(runs[0], plain, "auxiliary")
    require_routing(runs[1], joint_model, "auxiliary")
    assert joint_model.causal_routing == ROUTINGS["threshold"]


def test_only_a_model_whose_depth_routers_were_trained_for_it_decides_by_one_half(tiny, tmp_path):
    for router_loss in (0.0, 0.1):
        depth = DepthConfig(router_loss=router_loss)
        model = tiny.model.model_copy(update={"groups": "mod_moe_2t2i", "depth": depth})
        run = train(with_run(tiny, tmp_path / f"{router_loss}", model=model), WORLD, quiet=True)
        if router_loss:
            assert moma.load(run.path, "half").model.named_routing("causal").depth == Half()
            continue
        with pytest.raises(UserError, match="router_loss"):
            moma.load(run.path, "half")


@pytest.mark.parametrize(
    "groups",
    [
        "mod_moe_2t2i",
        "mod_token_2t2i",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("moe_2t2i", "mod")),
    ],
)
def test_learns_and_routers_learn_without_touching_the_model(tiny, tmp_path, groups):
    changes = {"model": tiny.model.model_copy(update={"groups": groups})}
    run = train(with_run(tiny, tmp_path / "run", **changes), WORLD, quiet=True)
    records = run.read_metrics()
    assert records[-1]["loss"] < records[0]["loss"]
    stage = {"stage": "aux_router", "from_": run.path} | changes
    routers = train(with_run(tiny, run.path / ROUTER_RUN, **stage), WORLD, quiet=True)
    before, after = (tensors_of(checkpoints_in(r.checkpoints)[-1]) for r in (run, routers))
    for key in before:
        if key.startswith("model."):
            changed = not torch.equal(before[key], after[key])
            assert changed == ("auxiliary" in key), key
    trained = {key for key in after if key.startswith("optimizer.")}
    assert trained and all("auxiliary" in key for key in trained)
    records = routers.read_metrics()
    assert records[-1]["loss"] < records[0]["loss"]
    model, recipe = load_run(run)  # finds the routers in the run's folder
    assert recipe.stage == "aux_router"
    require_routing(run, model, "auxiliary")
    assert model.causal_routing == ROUTINGS["threshold"]  # unless auxiliary routing is requested
    assert moma.load(run.path, "auxiliary").model.causal_routing == ROUTINGS["auxiliary"]
    for path in checkpoints_in(routers.checkpoints)[1:]:
        shutil.rmtree(path)
    model, _ = load_run(run)
    require_routing(run, model)  # by thresholds
    with pytest.raises(UserError, match="stage=aux_router"):  # they are not completely trained
        require_routing(run, model, "auxiliary")


def test_routers_count_as_trained_by_their_newest_checkpoint(tiny, tiny_run, tmp_path, monkeypatch):
    run = copy_of(tiny_run, tmp_path / "run")
    stage = {"stage": "aux_router", "from_": run.path}
    routers = train(with_run(tiny, run.path / ROUTER_RUN, **stage), WORLD, quiet=True)
    checked, real = [], checkpoint.find_damage

    def find_damage(path: Path, *ranks: int) -> list[str]:
        checked.append(path)
        return real(path, *ranks)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "find_damage", find_damage)
        load_run(run)
    newest = checkpoints_in(routers.checkpoints)[-1]
    assert checked == [newest]  # once, and no other checkpoint
    assert run_to_load(run).run.path == routers.path
    (shard,) = (newest / "tensors").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])  # of the last checkpoint; the others are intact
    assert load_run(run)[1].stage == "pretrain" and run_to_load(run).run.path == run.path
    with pytest.raises(UserError, match="stage=aux_router"):
        require_routing(run, load_run(run)[0], "auxiliary")


def test_interrupted_router_stage_equals_uninterrupted(tiny, tiny_run, tmp_path, monkeypatch):
    stage = {"stage": "aux_router", "from_": tiny_run.path}
    expected = train(with_run(tiny, tmp_path / "uninterrupted", **stage), WORLD, quiet=True)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(KilledError):
            train(with_run(tiny, tmp_path / "interrupted", **stage), WORLD, quiet=True)
    resumed = train(with_run(tiny, tmp_path / "interrupted", **stage), WORLD, quiet=True)
    assert_same_run(expected, resumed)


def test_untrained_routers_are_refused(tiny_run):
    with pytest.raises(UserError, match="stage=aux_router"):
        require_routing(tiny_run, load_run(tiny_run)[0], "auxiliary")


def test_a_run_of_another_recipe_is_refused(tiny, tiny_run):
    with pytest.raises(UserError, match="seed: 0 → 7"):
        train(with_run(tiny, tiny_run.path, seed=7), WORLD, quiet=True)


def test_dense_has_no_routers_to_train(tiny, tmp_path):
    dense = {"model": tiny.model.model_copy(update={"groups": "dense"})}
    run = train(with_run(tiny, tmp_path / "run", **dense), WORLD, quiet=True)
    stage = {"stage": "aux_router", "from_": run.path}
    with pytest.raises(UserError, match="no auxiliary routers to train"):
        train(with_run(tiny, tmp_path / "routers", **dense, **stage), WORLD, quiet=True)
    assert not (tmp_path / "routers").exists()


def test_a_run_without_checkpoint_is_refused(tiny_run, tmp_path):
    run = copy_of(tiny_run, tmp_path / "run")
    shutil.rmtree(run.checkpoints)
    with pytest.raises(
        UserError, match=rf"no checkpoint yet; go on with `moma train {run.recipe}`"
    ):
        load_run(run)


def test_no_pickle_in_a_checkpoint(tiny_run):
    files = [path for path in checkpoints_in(tiny_run.checkpoints)[-1].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_a_run_that_another_process_has_started_meanwhile_is_not_overwritten(
    tiny, tmp_path, monkeypatch
):
    recipe = tiny.model_copy(update={"run": tmp_path / "run"})
    prepare_model = loop.prepare_model

    def prepare_while_another_starts(*arguments):
        Run(recipe.run).path.mkdir()
        Run(recipe.run).create(recipe, Tokenizers(recipe.data.path))
        return prepare_model(*arguments)

    monkeypatch.setattr(loop, "prepare_model", prepare_while_another_starts)
    with pytest.raises(UserError, match="another process has started this run"):
        train(recipe, WORLD, quiet=True)
    assert not Run(recipe.run).metrics.exists()


def test_on_a_cpu_a_step_is_logged_before_the_next_one_begins(tiny, tmp_path, monkeypatch):
    """Otherwise the times of records would include a part of the next step, or lack one."""
    stage = tiny.pretrain.model_copy(update={"log_every": 1, "steps": 3, "checkpoint_every": 3})
    recipe = tiny.model_copy(update={"run": tmp_path / "run", "pretrain": stage})
    begin_step, logged = loop.LossMonitor.begin_step, []

    def count_records(monitor, step):
        logged.append(len(list(Run(recipe.run).iter_metrics())))
        begin_step(monitor, step)

    monkeypatch.setattr(loop.LossMonitor, "begin_step", count_records)
    train(recipe, WORLD, quiet=True)
    assert logged == [0, 1, 2]


def test_evaluation_on_data_that_was_prepared_otherwise_is_refused(tiny, tiny_run, tmp_path):
    """Documents that are held out now may have been trained on."""
    run, recipe = tiny_run, with_run(tiny, tiny_run.path)
    require_training_data(run, recipe)
    copied = tiny.data.model_copy(update={"path": tmp_path / "copy"})
    shutil.copytree(tiny.data.path, copied.path)
    require_training_data(run, recipe.model_copy(update={"data": copied}))
    other = copied.model_copy(update={"held_out": 0.4})
    prepare(tiny.model_copy(update={"data": other}), WORLD.device, quiet=True)
    with pytest.raises(UserError, match=r"copy: is not the data that .*run was trained on"):
        require_training_data(run, recipe.model_copy(update={"data": copied}))


def test_compilation_is_announced_before_the_first_step(tiny, tmp_path, capsys, monkeypatch):
    def message_of(name, compiles):
        stage = tiny.pretrain.model_copy(update={"compile": compiles, "steps": 2})
        train(tiny.model_copy(update={"run": tmp_path / name, "pretrain": stage}), WORLD, True)
        return capsys.readouterr().err

    # Nothing is compiled here, which would take too long.
    monkeypatch.setattr("moma.train.stages.can_compile", lambda device: False)
    monkeypatch.setattr("moma.train.loop.can_compile", lambda device: False)
    assert "training is slower; `moma doctor` says why" in message_of("refused", True)
    assert "compiled" not in message_of("unwanted", False)
    monkeypatch.setattr("moma.train.loop.can_compile", lambda device: True)
    assert "compiling; the first step takes minutes" in message_of("compiled", True)
    assert "compiling" not in message_of("eager", False)
    assert "compiling" not in message_of("compiled", True)  # it is finished
