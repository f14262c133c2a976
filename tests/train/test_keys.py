"""Every key of the training sections changes what it is meant to change."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.model.gpu_attention import FlexAttention, VarlenAttention
from moma.runtime import world as ranks
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.optimizer import OptimizerConfig, learning_rate
from moma.runtime.sharding import EngineConfig
from moma.runtime.tracking import TrackingConfig
from moma.runtime.world import World
from moma.train import changes, stages
from moma.train.loop import train
from moma.train.monitor import LossMonitor
from moma.train.recipe import Recipe, RouterOptimizerConfig, RouterStageConfig, StageConfig
from moma.train.stages import loss_function_of, make_step, prepare_model
from moma.train.step import to_device
from moma.vocabulary import Vocabulary
from tests.command_line import moma
from tests.factories import OperationCounter, synthetic_recipe, write_recipe

WORLD = World(torch.device("cpu"))
# The test of each key, which fails if the key is ignored; the optimizer's are parametrized below.
STAGE_TESTS = {
    "steps": "train/test_keys.py::test_counts_of_steps_and_files",
    "gradient_accumulation_steps": "train/test_keys.py::test_counts_of_steps_and_files",
    "log_every": "train/test_keys.py::test_counts_of_steps_and_files",
    "checkpoint_every": "train/test_keys.py::test_counts_of_steps_and_files",
    "keep_checkpoints": "train/test_keys.py::test_counts_of_steps_and_files",
    "keep_every": "train/test_keys.py::test_counts_of_steps_and_files",
    "on_fault": "train/test_fault.py::test_nonfinite_logits_follow_on_fault",
    "explosion": "train/test_monitor.py::test_check_equals_a_slow_reference",
    "z_loss": "train/test_keys.py::test_z_loss_takes_part_in_training",
    "finish": "train/test_finish.py::test_the_last_steps_route_by_thresholds",
    "auxiliary_routers": "train/test_loop.py::test_auxiliary_routers_are_trained_beside_the_model",
    "compile": "train/test_keys.py::test_layers_and_loss_are_compiled",
    "optimizer": "train/test_keys.py::test_every_key_of_the_optimizer_changes_the_weights",
}
ENGINE_TESTS = {
    "compute": "train/test_keys.py::test_compute_changes_the_dtype_of_products",
    "float8": "runtime/test_float8.py::test_experts_compute_in_float8",
    "reduce": "distributed/test_two_ranks.py::test_two_ranks_equal_one_on_the_same_token_groups",
    "reduce_once": "distributed/test_two_ranks.py::test_reductions_per_step",
    "deterministic": "train/test_keys.py::test_deterministic_training_avoids_flash_attention",
    "replicate": "distributed/test_two_ranks.py::test_impossible_replicas_are_refused",
    "recompute": "train/test_keys.py::test_recompute_repeats_operations",
    "global_batch_size": "distributed/test_two_ranks.py::test_the_global_batch_size_may_grow",
    "timeout": "train/test_keys.py::test_timeout_limits_waiting_for_ranks_and_locks",
    "trace": "train/test_stages.py::test_three_steps_are_traced",
}
TRACKING_TESTS = {
    "tensorboard": "train/test_keys.py::test_counts_of_steps_and_files",
    "wandb_project": "train/test_stages.py::test_wandb_without_its_package_is_refused",
}
OPTIMIZER = {
    "algorithm": "muon",
    "schedule": "cosine",
    "decay_steps": 1,
    "momentum": 0.5,
    "learning_rate": 2e-2,
    "warmup": 1,
    "final_ratio": 0.5,
    "beta1": 0.5,
    "beta2": 0.5,
    "epsilon": 1e-2,
    "weight_decay": 0.5,
    "clip": 1e-3,
    "router_rate": 0.5,
}
# Values without which a key has no effect.
NEEDED_BY = {
    "decay_steps": {"schedule": "wsd", "decay_steps": 10},
    "momentum": {"algorithm": "muon"},
}


@pytest.mark.parametrize(
    ("config", "tests"),
    [
        (StageConfig, STAGE_TESTS),
        (RouterStageConfig, STAGE_TESTS),
        (EngineConfig, ENGINE_TESTS),
        (TrackingConfig, TRACKING_TESTS),
        (OptimizerConfig, OPTIMIZER),
        (RouterOptimizerConfig, OPTIMIZER),
    ],
)
def test_every_key_has_a_test(config, tests):
    assert tests.keys() == config.model_fields.keys()
    for test in tests.values():
        if isinstance(test, str) and "::" in test:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text(), test


def with_pretrain(tiny: Recipe, **changes) -> Recipe:
    return tiny.model_copy(update={"pretrain": tiny.pretrain.model_copy(update=changes)})


def step_of(recipe: Recipe, monitor: LossMonitor | None = None):
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    step = make_step(recipe, prepare_model(recipe, vocabulary, WORLD), WORLD, monitor)
    return step, Batches(recipe.data, vocabulary, recipe.seed)


def trained_weights(recipe: Recipe) -> dict[str, Tensor]:
    step, batches = step_of(recipe)
    for number in range(4):
        rate = learning_rate(recipe.pretrain.optimizer, number, recipe.pretrain.steps)
        step([next(batches)], rate)
    return {name: p.detach().clone() for name, p in step.model.named_parameters()}


@pytest.fixture(scope="module")
def expected(tiny) -> dict[str, Tensor]:
    return trained_weights(tiny)


@pytest.mark.parametrize("key", OptimizerConfig.model_fields)
def test_every_key_of_the_optimizer_changes_the_weights(tiny, expected, key):
    assert key in OPTIMIZER, "add a value that changes the weights"
    optimizer = tiny.pretrain.optimizer.model_copy(update=NEEDED_BY.get(key, {}))
    before = (
        trained_weights(with_pretrain(tiny, optimizer=optimizer)) if key in NEEDED_BY else expected
    )
    changed = optimizer.model_copy(update={key: OPTIMIZER[key]})
    weights = trained_weights(with_pretrain(tiny, optimizer=changed))
    difference = max(float((weights[name] - before[name]).abs().max()) for name in weights)
    assert difference > 1e-5


def test_routers_learn_at_their_own_rate(tiny):
    optimizer = tiny.pretrain.optimizer.model_copy(update={"router_rate": 0.0})
    recipe = with_pretrain(tiny, optimizer=optimizer)
    step, batches = step_of(recipe)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step([next(batches)], 1e-2)
    for name, parameter in step.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name]) == name.endswith(".router.weight"), name


def test_z_loss_takes_part_in_training(tiny, expected):
    weights = trained_weights(with_pretrain(tiny, z_loss=1.0))
    assert not torch.allclose(weights["head.weight"], expected["head.weight"])


@pytest.mark.parametrize("faulty", [0, 1, 2])
def test_nonfinite_flags_of_every_micro_batch_count(tiny, faulty):
    monitor = LossMonitor(tiny.pretrain, WORLD.device)
    step, batches = step_of(tiny, monitor)
    loss_function, calls = step.loss_function, 0

    def with_flag(*arguments):
        nonlocal calls
        losses = loss_function(*arguments)
        flags = torch.tensor([False, calls == faulty])
        calls += 1
        return losses._replace(nonfinite_L=flags)

    step.loss_function = with_flag
    monitor.begin_step(5)
    step([next(batches) for _ in range(3)], 1e-2)
    assert int(monitor.first_fault["fault_step"]) == 5
    assert monitor.first_fault["fault_nonfinite"].tolist() == [0.0, 1.0]


def test_counts_of_steps_and_files(tiny, tmp_path):
    recipe = with_pretrain(
        tiny,
        steps=12,
        log_every=3,
        checkpoint_every=3,
        keep_checkpoints=1,
        keep_every=6,
        gradient_accumulation_steps=2,
    )
    tracking = tiny.tracking.model_copy(update={"tensorboard": False})
    run = train(
        recipe.model_copy(update={"run": tmp_path / "run", "tracking": tracking}), WORLD, quiet=True
    )
    records, config = run.read_metrics(), recipe.pretrain
    tokens_per_step = 2 * tiny.data.micro_batch_size * tiny.data.sequence_length
    assert [record["step"] for record in records] == [3, 6, 9, 12]
    assert [record["tokens"] for record in records] == [
        step * tokens_per_step for step in (3, 6, 9, 12)
    ]
    assert [record["learning_rate"] for record in records] == [
        learning_rate(config.optimizer, step - 1, config.steps) for step in (3, 6, 9, 12)
    ]
    names = [path.name for path in checkpoints_in(run.checkpoints)]
    assert names == ["step-00000006", "step-00000012"]
    assert not (run.path / "tensorboard").exists()


@pytest.mark.parametrize("stage", ["pretrain", "upcycle", "aux_router"])
def test_each_stage_has_its_own_section(tiny, stage):
    changed = getattr(tiny, stage).model_copy(update={"steps": 99})
    recipe = tiny.model_copy(update={"stage": stage, stage: changed})
    assert recipe.stage_config is changed


def test_the_seed_chooses_weights_and_documents(tiny, tmp_path):
    recipe = with_pretrain(tiny, steps=1, log_every=1, checkpoint_every=1)
    recipe = recipe.model_copy(update={"run": tmp_path / "run", "seed": 1})
    (record,) = train(recipe, WORLD, quiet=True).read_metrics()
    step, batches = step_of(recipe)
    rate = learning_rate(recipe.pretrain.optimizer, 0, 1)
    loss_M, _, targets_M = step([next(batches)], rate)[0]
    assert record["loss"] == pytest.approx(float(loss_M.sum() / targets_M.sum()))
    other_step, other_batches = step_of(tiny)
    assert not torch.equal(step.model.head.weight, other_step.model.head.weight)
    assert (next(batches).tokens_BS != next(other_batches).tokens_BS).any()


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_and_loss_are_compiled(tiny, monkeypatch, compiled):
    calls: list[object] = []

    def compile_function(function, **_):
        calls.append(function)
        return function

    monkeypatch.setattr(stages, "can_compile", lambda device: True)
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: calls.append(type(module)))
    monkeypatch.setattr(torch, "compile", compile_function)
    recipe = with_pretrain(tiny, compile=compiled)
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, WORLD)
    assert calls == ([type(layer) for layer in model.layers] if compiled else [])
    loss_function_of(recipe, WORLD.device)
    assert len(calls) == (len(model.layers) + 1 if compiled else 0)


def count_operations(recipe: Recipe) -> Counter[str]:
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, WORLD)
    batch = to_device(next(Batches(recipe.data, vocabulary, recipe.seed)), WORLD.device)
    with OperationCounter() as counter:
        loss_function_of(recipe, WORLD.device)(model, batch).objective.backward()
    return counter.counts


def with_engine(tiny: Recipe, **changes) -> Recipe:
    return tiny.model_copy(update={"engine": tiny.engine.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("deterministic", "trains", "expected"),
    [(False, True, VarlenAttention), (True, True, FlexAttention), (True, False, VarlenAttention)],
)
def test_deterministic_training_avoids_flash_attention(tiny, deterministic, trains, expected):
    engine = EngineConfig(deterministic=deterministic)
    model = tiny.model.model_copy(update={"dim": 64, "heads": 2})
    recipe = tiny.model_copy(update={"engine": engine, "model": model})
    assert type(recipe.attention_kernel(torch.device("cuda"), trains)) is expected


@pytest.mark.gpu
def test_deterministic_training_on_a_gpu_repeats_bit_by_bit():
    changes = {"dim": 128, "heads": 2, "layers": 2, "groups": "mod_moe_4t4i"}
    recipe = synthetic_recipe(codes=16, image_share=0.25, sequence_length=512, model=changes)
    recipe = recipe.model_copy(update={"engine": EngineConfig(deterministic=True)})
    world, outcomes = World(torch.device("cuda")), []
    for _ in range(2):
        vocabulary = synthetic_vocabulary(recipe)
        model = prepare_model(recipe, vocabulary, world)
        step, batches = make_step(recipe, model, world), synthetic_batches(recipe, vocabulary)
        for _ in range(3):
            step([batches.pack()], 1e-2)
        outcomes.append([parameter.detach().cpu() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_recompute_repeats_operations(tiny):
    none, selective, layer = (
        count_operations(with_engine(tiny, recompute=how)) for how in ("none", "selective", "layer")
    )
    top_k, activation = "aten.topk.default", "aten.silu.default"
    assert none[top_k] == selective[top_k] < layer[top_k]
    assert none[activation] < selective[activation]


def test_compute_changes_the_dtype_of_products(tiny):
    losses = []
    for dtype in ("fp32", "bf16"):
        step, batches = step_of(with_engine(tiny, compute=dtype))
        losses.append(step([next(batches)], 1e-2)[0][0])
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)


def test_timeout_limits_waiting_for_ranks_and_locks(tiny, tmp_path, monkeypatch):
    seconds = []

    def refuse(*arguments):
        seconds.append(arguments[-1])
        raise UserError("stopped by the test")

    write_recipe(with_engine(tiny, timeout=8.0), tmp_path / "recipe.toml")
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "join_world", refuse)
        assert moma("train", tmp_path / "recipe.toml").code == UserError.CODE
    monkeypatch.setattr(changes, "lock_folder", refuse)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="stopped by the test"):
        train(with_engine(tiny, timeout=8.0).model_copy(update={"run": tmp_path / "run"}), WORLD)
    assert seconds == [8.0, 4.0]
