"""Products in float8, emulated on a CPU; most tests need `pip install 'moma[float8]'`."""

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from moma.bench.synthetic import synthetic_batches, synthetic_vocabulary
from moma.errors import UserError
from moma.model.float8_experts import float8_product
from moma.model.grouped import grouped_product
from moma.model.transformer import Transformer
from moma.runtime.world import World
from moma.train import stages
from moma.train.recipe import Recipe
from moma.train.stages import make_step, prepare_model
from tests.factories import synthetic_recipe

WORLD = World(torch.device("cpu"))
with_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
PROJECTIONS = ("query", "key", "value", "output")
DENSE = {"modalities": ["text", "image"], "experts": 1}
GROUPS = [{"modalities": ["text"], "experts": 2}, {"modalities": ["image"], "experts": 1}, DENSE]


def recipe_of(
    float8: str, implementation: str | None = None, groups: list[Any] = GROUPS, **engine
) -> Recipe:
    """A layer with mixture-of-depths, routed groups and a feed-forward for all modalities."""
    return synthetic_recipe(
        codes=16,
        image_share=4 * 16 / 288,
        sequence_length=72,  # 72 of 288 tokens are selected, not a multiple of 16
        model={
            "groups": groups,
            "experts_implementation": implementation,
            "dim": 32,
            "layers": 2,
            "heads": 2,
            "depth": {"layers": [1]},
        },
        engine={"float8": float8, **engine},
        pretrain={"compile": False},
    )


def build(recipe: Recipe) -> Transformer:
    return prepare_model(recipe, synthetic_vocabulary(recipe), WORLD)


@with_torchao
def test_linear_layers_are_converted_and_no_others():
    model = build(recipe_of("emulate"))
    found = {
        name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"
    }
    attention = {f"layers.{n}.attention.{name}" for n in range(2) for name in PROJECTIONS}
    parts = ("gate", "up", "down")
    dense = {f"layers.{n}.experts.groups.2.feed_forward.{name}" for n in range(2) for name in parts}
    assert found == attention | dense
    plain = build(recipe_of("off"))
    assert not any(type(module).__name__ == "Float8Linear" for module in plain.modules())
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def rounded(x: Tensor) -> Tensor:
    """Round to float8 (e4m3), scaled by the largest magnitude."""
    scale = torch.finfo(torch.float8_e4m3fn).max / x.abs().max()
    return (x * scale).to(torch.float8_e4m3fn).float() / scale


@with_torchao
def test_a_product_is_that_of_rounded_factors():
    torch.manual_seed(0)
    query = build(recipe_of("emulate")).get_submodule("layers.0.attention.query")
    x_ND = torch.randn(6, 32)
    expected = rounded(x_ND) @ rounded(query.get_parameter("weight").detach()).T
    torch.testing.assert_close(query(x_ND).detach(), expected)


@with_torchao
def test_products_of_experts_are_those_of_torchao():
    """Its recipes for linear layers: one keeps the weights' gradients exact; the other does not,
    but scales weights by row for the gradient of the inputs."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
    from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

    torch.manual_seed(0)
    x, weight, grad = torch.randn(24, 32), torch.randn(32, 48), torch.randn(24, 48)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    emulated = LinearMMConfig(*[ScaledMMConfig(emulate=True)] * 3)
    theirs = []
    for name in ("rowwise_with_gw_hp", "rowwise"):
        config = Float8LinearConfig.from_recipe_name(name)
        y = matmul_with_hp_or_float8_args.apply(x, weight, emulated, config)
        theirs.append([y, *torch.autograd.grad(y, (x, weight), grad)])
    y = float8_product(x, [weight[None]], torch.tensor([24], dtype=torch.int32), emulate=True)
    ours = [y, *torch.autograd.grad(y, (x, weight), grad)]
    expected = [theirs[0][0], theirs[1][1], theirs[0][2]]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("float8", ["off", "emulate"])
def test_experts_compute_in_float8(float8, monkeypatch):
    monkeypatch.setattr(stages, "use_float8", lambda *_: None)  # linear layers
    model = build(recipe_of(float8))
    products = [module.product for module in model.modules() if hasattr(module, "product")]
    assert len(products) >= 4
    assert all((product is grouped_product) == (float8 == "off") for product in products)


def test_kernels_without_float8_are_refused():
    with pytest.raises(UserError, match=r"engine.float8 \('on'\): .* 'triton' has no products"):
        recipe_of("on", implementation="triton")
    recipe_of("on", implementation="triton", groups=[DENSE])  # has no experts to compute by them


@with_torchao
def test_training_in_float8_stays_near_fp32():
    losses: dict[str, list[float]] = {}
    for float8 in ("off", "emulate"):
        recipe = recipe_of(float8)
        step = make_step(recipe, build(recipe), WORLD)
        batch = synthetic_batches(recipe, synthetic_vocabulary(recipe)).pack()
        sums = [step([batch], learning_rate=1e-2)[0] for _ in range(6)]
        losses[float8] = [float(each[0].sum() / each[2].sum()) for each in sums]
    assert losses["emulate"] != losses["off"]
    assert losses["emulate"] == pytest.approx(losses["off"], rel=0.02)
    assert losses["emulate"][-1] < 0.8 * losses["emulate"][0]


@with_torchao
@pytest.mark.gpu
def test_a_gpu_trains_in_float8_near_bf16():
    losses = []
    for float8 in ("off", "on"):
        recipe, world = recipe_of(float8), World(torch.device("cuda"))
        vocabulary = synthetic_vocabulary(recipe)
        step = make_step(recipe, prepare_model(recipe, vocabulary, world), world)
        batch = synthetic_batches(recipe, vocabulary).pack()
        losses.append([float(step([batch], learning_rate=1e-2)[0][0].sum()) for _ in range(4)])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"float8": "on"}, "has no matrix products in float8; use a GPU of compute capability 8.9"),
        ({"float8": "emulate", "compute": "bf16"}, "on a CPU use engine.compute=fp32"),
    ],
)
def test_a_device_without_float8_is_refused(changes, message):
    with pytest.raises(UserError, match=f"engine.float8: .*{message}"):
        build(recipe_of(**changes))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"needs torchao .*pip install 'moma\[float8\]'"):
        build(recipe_of("emulate"))
