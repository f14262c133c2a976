"""Gradients of every module by its input and its weights, against finite differences."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from moma.model.architecture import ModelConfig
from moma.model.attention import Attention
from moma.model.decoder_layer import build_layer
from moma.model.depth import DepthConfig
from moma.model.experts import MixtureOfExperts
from moma.model.implementations import ImplementationName, build_experts, build_group
from moma.model.layers import SwiGLU, rotary_cos_sin
from moma.model.routers import AuxiliaryRouter
from moma.model.routing import Auxiliary, ExpertChoice, Routing, Threshold
from moma.vocabulary import IMAGE, MODALITIES, TEXT
from tests.factories import make_context, make_vocabulary
from tests.model.three_modalities import group

DIM, HIDDEN, SHARES = 8, 3, (0.5, 0.5)
VOCABULARY = make_vocabulary(12, (5, 6), 1)
OVERLAPPING = (group("text", 2), group("image", 1), group("text image", 2))
MODALITY = torch.tensor([[TEXT, IMAGE, TEXT, IMAGE], [TEXT, TEXT, IMAGE, IMAGE]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
POSITIONS = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
ROTARY = rotary_cos_sin(POSITIONS, DIM // 2, 10_000.0)


def assert_gradients(module: nn.Module, x: Tensor, *rest: Any, output: Callable = lambda y: y):
    """Compare the gradients of `output(module(x, *rest))` with finite differences.

    Each number is perturbed if there are few, otherwise a random direction (`fast_mode`).
    Auxiliary routers inside the module are left out: expert choice does not use them.
    """
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    weights = {name: p for name, p in module.named_parameters() if "auxiliary." not in name}

    def run(x, *values):
        named = dict(zip(weights, values, strict=True))
        return output(torch.func.functional_call(module, named, (x, *rest)))

    inputs = (x.double().requires_grad_(), *weights.values())
    # Gradients of zero would pass, too.
    for gradient in torch.autograd.grad(run(*inputs).square().sum(), inputs):
        assert gradient.any()
    many = sum(each.numel() for each in inputs) > 300
    assert torch.autograd.gradcheck(run, inputs, fast_mode=many)


def first(outputs: tuple) -> Tensor:
    return outputs[0]


def some_tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(0))


def test_gradients_of_an_auxiliary_router():
    assert_gradients(AuxiliaryRouter(DIM, 3), some_tokens(5))


def test_gradients_of_a_feed_forward():
    assert_gradients(SwiGLU(DIM, HIDDEN), some_tokens(5))


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(
    "policy", [ExpertChoice(), ExpertChoice("actual"), Threshold(), Auxiliary()]
)
def test_gradients_of_a_group(experts, policy):
    module = build_group(DIM, HIDDEN, group("text", experts), (0.75, 0.25))
    routing = Routing(policy)
    tokens = module.find_tokens(MODALITY.flatten(), routing)
    assert_gradients(module, some_tokens(8), tokens, routing, output=first)


@pytest.mark.parametrize("implementation", get_args(ImplementationName))
@pytest.mark.parametrize("token_fraction", [1.0, 0.5])
def test_gradients_of_overlapping_groups_in_every_implementation(implementation, token_fraction):
    groups = [
        build_group(DIM, HIDDEN, each, SHARES, MODALITIES, token_fraction) for each in OVERLAPPING
    ]
    experts = build_experts(groups, implementation)
    assert (type(experts) is MixtureOfExperts) == (implementation == "sequential")
    assert_gradients(experts, some_tokens(2, 4), MODALITY, Routing(), output=first)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_gradients_of_attention_within_documents(kv_heads, norm):
    module = Attention(DIM, 2, kv_heads, norm)
    context = make_context(MODALITY, DOCUMENTS, ROTARY)
    assert_gradients(module, some_tokens(2, 4), context)


@pytest.mark.parametrize("norm", ["swin", "pre"])
@pytest.mark.parametrize("depth", [None, "batch", "sequence"])
@pytest.mark.parametrize("groups", ["dense", "moe_1t1i", "moe_2t2i"])
def test_gradients_of_a_layer(groups, depth, norm):
    config = ModelConfig(
        groups=groups,
        depth=depth and DepthConfig(capacity_factor=0.5, scope=depth),
        dim=DIM,
        hidden=HIDDEN,
        layers=1,
        heads=2,
        norm=norm,
    )
    layer = build_layer(0, config, VOCABULARY, SHARES)
    context = make_context(MODALITY, DOCUMENTS, ROTARY)
    assert_gradients(layer, some_tokens(2, 4), context, Routing(), output=first)
