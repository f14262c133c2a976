"""Keys of [pretrain] and [pretrain.optimizer] change what a step computes."""

import pytest
import torch
from torch import Tensor

from moma.data.batches.iterator import Batches
from moma.runtime.optimizer import OptimizerConfig, learning_rate
from moma.runtime.world import World
from moma.train.monitor import LossMonitor
from moma.train.recipe import Recipe
from moma.train.stages import make_step, prepare_model
from moma.vocabulary import Vocabulary

WORLD = World(torch.device("cpu"))
OPTIMIZER = {
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
    optimizer = tiny.pretrain.optimizer.model_copy(update={key: OPTIMIZER[key]})
    weights = trained_weights(with_pretrain(tiny, optimizer=optimizer))
    difference = max(float((weights[name] - expected[name]).abs().max()) for name in weights)
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
    objective, calls = step.objective, 0

    def with_flag(*arguments):
        nonlocal calls
        losses = objective(*arguments)
        flags = torch.tensor([False, calls == faulty])
        calls += 1
        return losses._replace(nonfinite_L=flags)

    step.objective = with_flag
    monitor.begin_step(5)
    step([next(batches) for _ in range(3)], 1e-2)
    assert int(monitor.first_fault["fault_step"]) == 5
    assert monitor.first_fault["fault_nonfinite"].tolist() == [0.0, 1.0]
