"""Every stage: trained and frozen parameters, initial state, chains, refused recipes."""

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.evaluate.perplexity import evaluate
from moma.files import lock_folder
from moma.model.depth import DepthConfig
from moma.model.experts import ExpertGroup
from moma.recipe import read_recipe, shipped_recipe
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in, load_model, newest_intact, read_state
from moma.runtime.world import World
from moma.train.chain import Evaluation, next_command, read_chain, run_chain
from moma.train.loop import train
from moma.train.metrics import TIMING_KEYS
from moma.train.recipe import Recipe
from moma.train.restore import load_run
from moma.train.stages import find_source_run, loss_function_of, prepare_model
from moma.train.step import to_device
from moma.vocabulary import Vocabulary
from tests.factories import write_recipe

WORLD = World(torch.device("cpu"))


def with_groups(tiny: Recipe, groups: str, **changes) -> Recipe:
    model = tiny.model.model_copy(update={"groups": groups})
    return tiny.model_copy(update={"model": model, **changes})


def weights_at(run: Run, recipe: Recipe, index: int) -> dict[str, torch.Tensor]:
    model = recipe.build_model(Vocabulary.load(run.tokenizers.vocabulary))
    load_model(checkpoints_in(run.checkpoints)[index], model, WORLD)
    return dict(model.named_parameters())


@pytest.fixture(scope="module")
def seed(tiny, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("seed")
    return train(with_groups(tiny, "mod_moe_1t1i", run=folder / "seed"), WORLD, quiet=True)


@pytest.fixture(scope="module")
def upcycled(tiny, seed) -> Run:
    stage = tiny.pretrain.model_copy(update={"steps": 6, "checkpoint_every": 2})
    changes = {"run": seed.path.parent / "upcycled", "stage": "upcycle", "from_": seed.path}
    recipe = with_groups(tiny, "mod_moe_2t2i", **changes, upcycle=stage)
    return train(recipe, WORLD, quiet=True)


def recipe_of(run: Run) -> Recipe:
    return run.read_recipe(Recipe)


@pytest.mark.parametrize("stage", ["pretrain", "upcycle", "aux_router"])
def test_trained_parameters_change_and_frozen_ones_do_not(tiny, seed, upcycled, stage, tmp_path):
    """Every trainable parameter got a gradient, without which a step fails, and changed."""
    runs = {"pretrain": seed, "upcycle": upcycled}
    if stage == "aux_router":
        update = {"stage": stage, "from_": upcycled.path, "run": tmp_path / "routers"}
        runs[stage] = train(recipe_of(upcycled).model_copy(update=update), WORLD, quiet=True)
    recipe = recipe_of(runs[stage])
    before, after = (weights_at(runs[stage], recipe, index) for index in (0, -1))
    for name, old in before.items():
        trained = (".auxiliary." in name) == (stage == "aux_router")
        assert torch.equal(old, after[name]) != trained, name


@pytest.mark.parametrize("stage", ["pretrain", "upcycle", "aux_router"])
def test_every_trainable_parameter_gets_a_gradient(tiny, seed, upcycled, stage):
    """It is not all zeros, which weight decay could hide."""
    recipe = recipe_of(seed if stage == "pretrain" else upcycled)
    if stage == "aux_router":
        recipe = recipe.model_copy(update={"stage": stage, "from_": upcycled.path})
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    source = find_source_run(recipe, WORLD)
    # A depth router could drop all tokens of a modality; here it takes all tokens.
    every = recipe.model.model_copy(update={"depth": DepthConfig(capacity_factor=1.0)})
    recipe = recipe.model_copy(update={"model": every})
    model = prepare_model(recipe, vocabulary, WORLD, source)
    batch = to_device(next(Batches(recipe.data, vocabulary, recipe.seed)), WORLD.device)
    loss_function_of(recipe, WORLD.device)(model, batch).objective.backward()
    for name, parameter in model.named_parameters():
        trained = (".auxiliary." in name) == (stage == "aux_router")
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == trained, name


def copy_of(run: Run, folder: Path, **changes) -> tuple[Run, Recipe]:
    """A copy of a run, with the copy's folder in its recipe."""
    shutil.copytree(run.path, folder)
    recipe = recipe_of(run).model_copy(update={"run": folder, **changes})
    Run(folder).update_recipe(recipe)
    return Run(folder), recipe


def damage_newest(run: Run) -> Path:
    newest = checkpoints_in(run.checkpoints)[-1]
    (shard,) = (newest / "tensors").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1])
    return newest


def test_a_resumed_run_does_not_need_its_seed_run(seed, upcycled, tmp_path, capsys):
    """Damaged twice at the same step, in a folder named like a URL and a checkpoint."""
    run, recipe = copy_of(upcycled, tmp_path / "a:b/step-1", from_=tmp_path / "gone")
    for name in ("step-00000006.damaged", "step-00000006.damaged-2"):
        newest = damage_newest(run)
        train(recipe, WORLD, quiet=True)
        assert "resuming from step-00000004" in capsys.readouterr().err
        assert newest.is_dir() and (run.checkpoints / name).is_dir()
    drop = (*TIMING_KEYS, "recipe")
    records, others = (
        [{k: v for k, v in record.items() if k not in drop} for record in each.read_metrics()]
        for each in (run, upcycled)
    )
    assert records == others


def test_a_seed_run_with_a_damaged_last_checkpoint_is_refused(tiny, seed, tmp_path):
    run, _ = copy_of(seed, tmp_path / "seed")
    damage_newest(run)
    for stage in ("upcycle", "aux_router"):
        changes = {"run": tmp_path / "run", "stage": stage, "from_": run.path}
        recipe = with_groups(tiny, "mod_moe_1t1i", **changes)
        with pytest.raises(
            UserError, match=r"not trained to its end \(step-00000004 is its newest"
        ):
            train(recipe, WORLD, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_changed(seed):
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in seed.path.rglob("*") if path.is_file()}

    before = state()
    train(recipe_of(seed), WORLD, quiet=True)
    assert state() == before


def test_a_folder_in_use_by_another_process_is_refused(tiny, tmp_path, capsys):
    engine = tiny.engine.model_copy(update={"timeout": 0.1})
    recipe = tiny.model_copy(update={"run": tmp_path / "run", "engine": engine})
    (tmp_path / "run").mkdir()
    with (
        lock_folder(tmp_path / "run", 0),
        pytest.raises(UserError, match="in use by another process"),
    ):
        train(recipe, WORLD, quiet=True)
    assert "waiting for another process" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())
    with lock_folder(tmp_path / "run", 0):  # the refused process released the lock
        pass


def test_three_steps_are_traced(tiny, tmp_path):
    engine = tiny.engine.model_copy(update={"trace": 2})
    run = train(tiny.model_copy(update={"run": tmp_path / "run", "engine": engine}), WORLD, True)
    (file,) = (run.path / "trace").iterdir()
    assert file.name == "trace-00000005.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events]
    assert sum("AdamW.step" in name for name in names) == 3


def test_an_upcycled_run_continues_the_counters_of_its_seed_run(tiny, seed, upcycled):
    last, records = seed.read_metrics()[-1], upcycled.read_metrics()
    tokens = 2 * tiny.data.micro_batch_size * tiny.data.sequence_length
    assert [record["tokens"] for record in records] == [
        last["tokens"] + n * tokens for n in (1, 2, 3)
    ]
    assert records[0]["flops"] > last["flops"]
    step = (records[1]["flops"] - records[0]["flops"], records[0]["flops"] - last["flops"])
    assert step[0] == pytest.approx(step[1])
    # The schedule restarts with its warm-up; the data continues.
    assert records[0]["learning_rate"] == pytest.approx(tiny.pretrain.optimizer.learning_rate)
    state = read_state(checkpoints_in(upcycled.checkpoints)[-1])
    assert state["tokens"] == records[-1]["tokens"] and state["source_tokens"] == last["tokens"]
    assert set(records[-1]["routers"]) == {"0.text", "0.image", "0.depth", "1.text", "1.image"}
    assert load_run(upcycled)[1].stage == "upcycle"


def test_an_upcycled_run_continues_the_data_of_its_seed_run(tiny, seed, tmp_path):
    """Its data state equals that of a seed run of as many steps more."""
    stage = tiny.pretrain.model_copy(update={"steps": 2, "checkpoint_every": 2})
    changes = {"run": tmp_path / "run", "stage": "upcycle", "from_": seed.path, "upcycle": stage}
    run = train(with_groups(tiny, "mod_moe_2t2i", **changes), WORLD, quiet=True)
    longer = tiny.pretrain.model_copy(update={"steps": 10, "checkpoint_every": 10})
    other = with_groups(tiny, "mod_moe_1t1i", run=tmp_path / "longer", pretrain=longer)
    whole = train(other, WORLD, quiet=True)
    states = []
    for each in (run, whole):
        path, _ = newest_intact(each.checkpoints, WORLD)
        assert path is not None
        states.append(json.loads((path / "rank-0.json").read_text())["data"])
    assert states[0] == states[1]


@pytest.mark.parametrize(("change", "named"), [({"seed": 5}, "seed"), ({"weight": 9.0}, "weights")])
def test_an_upcycled_run_of_other_documents_writes_nothing(tiny, seed, tmp_path, change, named):
    stage = tiny.pretrain.model_copy(update={"steps": 2, "checkpoint_every": 2})
    changes = {"run": tmp_path / "run", "stage": "upcycle", "from_": seed.path, "upcycle": stage}
    recipe = with_groups(tiny, "mod_moe_2t2i", **changes)
    if "weight" in change:
        first, *others = tiny.data.sources
        sources = (first.model_copy(update=change), *others)
        wrong = {"data": tiny.data.model_copy(update={"sources": sources})}
    else:
        wrong = change
    with pytest.raises(UserError, match=r"belongs to other documents: .* restore them, or begin"):
        train(recipe.model_copy(update=wrong), WORLD, quiet=True)
    assert not (tmp_path / "run").exists()
    train(recipe, WORLD, quiet=True)


def test_a_moved_chain_can_be_resumed(seed, upcycled, tmp_path, capsys):
    """The location of its seed run does not matter; a checkpoint is missing, so that it trains."""
    moved = {run: tmp_path / run.path.name for run in (seed, upcycled)}
    for run, folder in moved.items():
        shutil.copytree(run.path, folder)
    run = Run(moved[upcycled])
    shutil.rmtree(checkpoints_in(run.checkpoints)[-1])
    recipe = recipe_of(run).model_copy(update={"run": run.path, "from_": moved[seed]})
    train(recipe, WORLD, quiet=True)
    assert f"from: '{seed.path}' → '{moved[seed]}'" in capsys.readouterr().err
    assert recipe_of(run) == recipe
    expected, found = (weights_at(each, recipe, -1) for each in (upcycled, run))
    assert all(torch.equal(weights, found[name]) for name, weights in expected.items())


def test_a_chain_resumes_at_the_right_stage(tiny, tmp_path, monkeypatch):
    write_recipe(tiny, tmp_path / "base.toml")
    chain = tmp_path / "chain.toml"
    chain.write_text(f"""
extends = "base.toml"
run = "{tmp_path}/chain"
[upcycle]
steps = 4
log_every = 2
checkpoint_every = 2
compile = false
[[chain]]
name = "seed"
model = {{ groups = "moe_1t1i" }}
[[chain]]
stage = "upcycle"
model = {{ groups = "moe_2t2i" }}
[[chain]]
stage = "aux_router"
[[chain]]
stage = "evaluate"
""")
    steps = read_chain(chain)
    runs = [tmp_path / "chain" / name for name in ("seed", "upcycle", "upcycle/aux_router")]
    assert [step.run for step in steps] == [*runs, runs[1]]
    assert [step.from_ for step in steps if isinstance(step, Recipe)] == [None, *runs[:2]]
    routings = [next_command(step).split()[-1] for step in steps[:3]]
    assert routings == ["causal", "causal", "auxiliary"]
    run_chain(steps[:2], WORLD, evaluate, quiet=True)  # as if it had been stopped here
    fingerprint = (runs[0] / "checkpoints" / "latest").stat().st_mtime_ns
    assert run_chain(read_chain(chain), WORLD, evaluate, quiet=True) == runs[2]
    assert (runs[0] / "checkpoints" / "latest").stat().st_mtime_ns == fingerprint
    result = json.loads((runs[1] / "evaluation-causal.json").read_text())
    assert result.pop("fingerprint")
    assert all(math.isfinite(value) for value in result.values() if value is not None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('[[chain]]\nstage = "evaluate"', "there is no stage before it"),
        ("[[chain]]\nmodle = 1", "stage 1 of the chain: unknown key 'modle'"),
        ('[[chain]]\nname = "a"\n[[chain]]\nname = "a"', "two stages write"),
        (
            '[[chain]]\n[[chain]]\nstage = "evaluate"\nrouting = "best"',
            "should be 'choice', 'causal', 'threshold', 'auxiliary' or 'half'",
        ),
        ('[[chain]]\nrun = "x"', "write 'run' above the chain"),
        ("chain = 3", "one \\[\\[chain\\]\\] table"),
    ],
)
def test_wrong_chains_are_refused(tiny, tmp_path, lines, message):
    write_recipe(tiny, tmp_path / "base.toml")
    (tmp_path / "chain.toml").write_text(f'extends = "base.toml"\n{lines}\n')
    with pytest.raises(UserError, match=message):
        read_chain(tmp_path / "chain.toml")


def test_overrides_take_precedence_over_steps(tiny, tmp_path):
    write_recipe(tiny, tmp_path / "base.toml")
    (tmp_path / "chain.toml").write_text(
        'extends = "base.toml"\n[[chain]]\nname = "a"\npretrain = { steps = 3 }\n'
        '[[chain]]\nname = "b"\nmodel = { layers = 3 }\n'
    )
    overrides = ["pretrain.steps=5", "chain.0.model.layers=4", f"run={tmp_path}/runs"]
    steps = [each for each in read_chain(tmp_path / "chain.toml", overrides)]
    assert [step.run.name for step in steps] == ["a", "b"]
    assert steps[0].run.parent == tmp_path / "runs"
    for step, layers in zip(steps, (4, 3), strict=True):
        assert isinstance(step, Recipe)
        assert (step.pretrain.steps, step.model.layers) == (5, layers)


def test_the_shipped_chain_trains_as_long_as_the_demo():
    demo = read_recipe(Recipe, shipped_recipe("demo.toml"))
    steps = read_chain(shipped_recipe("demo_chain.toml"))
    assert isinstance(steps[-1], Evaluation)
    assert [step.stage for step in steps if isinstance(step, Recipe)] == [
        "pretrain", "upcycle", "aux_router",
    ]  # fmt: skip
    trained = [step.stage_config.steps for step in steps[:2] if isinstance(step, Recipe)]
    assert sum(trained) == demo.pretrain.steps


@pytest.mark.parametrize("stage", ["pretrain", "upcycle", "aux_router"])
@pytest.mark.parametrize("noise", [None, False, True])
def test_only_upcycling_trains_with_router_noise_by_default(tiny, stage, noise):
    recipe = with_groups(tiny, "moe_2t2i", stage=stage)
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"router_noise": noise})}
    )
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, WORLD)
    found = {module.noise for module in model.modules() if isinstance(module, ExpertGroup)}
    assert found == {stage == "upcycle" if noise is None else noise}


def test_the_shipped_chain_upcycles_as_in_the_paper():
    steps = read_chain(shipped_recipe("paper/chains/435m_upcycled.toml"))
    seed, upcycled, routers = (step for step in steps if isinstance(step, Recipe))
    assert (seed.stage_config.steps, seed.model.groups) == (10_000, "moe_1t1i")
    assert upcycled.upcycle == upcycled.pretrain.model_copy(update={"steps": 160_000})
    assert upcycled.training_model.router_noise and not seed.training_model.router_noise
    assert upcycled.model.groups == routers.model.groups == "moe_4t4i"


def test_tensorboard_shows_the_values_of_the_log(seed):
    events = EventAccumulator(str(seed.path / "tensorboard"))
    events.Reload()
    records = seed.read_metrics()
    for key in ("loss", "gradient_norms/experts", "routers/0.depth/min_score"):
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        values = []
        for record in records:
            value = record
            for part in key.split("/"):
                value = value[part]
            values.append((record["step"], pytest.approx(value, rel=1e-5)))
        assert shown == values
    assert set(TIMING_KEYS) <= set(events.Tags()["scalars"])


def test_wandb_without_its_package_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    tracking = tiny.tracking.model_copy(update={"wandb_project": "moma"})
    recipe = tiny.model_copy(update={"run": tmp_path / "run", "tracking": tracking})
    with pytest.raises(UserError, match="pip install wandb"):
        train(recipe, WORLD, quiet=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("out of memory"), UserError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), UserError),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), UserError),
        (RuntimeError("an illegal instruction"), RuntimeError),
    ],
)
def test_only_a_lack_of_memory_is_called_one(tiny, monkeypatch, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch.nn.Module, "to_empty", fail)
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    with pytest.raises(expected, match=r"model: [\d,]+ parameters do not fit|illegal"):
        prepare_model(tiny, vocabulary, WORLD)
    with pytest.raises(expected, match=r"the shards of each rank of [\d,]+ parameters do|illegal"):
        prepare_model(tiny, vocabulary, World(torch.device("cpu"), size=2))
