"""Every key of `[model]` has an effect; a new key without an entry here fails."""

from typing import Any

import pytest
import torch

from moma.model.architecture import ModelConfig
from moma.model.depth import DepthConfig
from moma.model.groups import GroupConfig, TokenChoiceConfig
from moma.model.transformer import Transformer
from tests.factories import make_vocabulary

TEXT_IMAGE = ["text", "image"]
BASE: dict[str, Any] = {
    "groups": [{"modalities": ["text"], "experts": 2}, {"modalities": ["image"], "experts": 2}],
    "depth": {"capacity_factor": 0.5, "layers": [0], "scope": "batch"},
    "dim": 24,
    "layers": 2,
    "heads": 4,
}
# For each key: other values, and what they change.
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "groups": ({"groups": "moe_2t3i"}, "parameters"),
    "groups.modalities": (
        {"groups": [{"modalities": TEXT_IMAGE, "experts": 2}, BASE["groups"][1]]},
        "logits",
    ),
    "groups.experts": (
        {"groups": [{"modalities": ["text"], "experts": 3}, BASE["groups"][1]]},
        "parameters",
    ),
    "depth": ({"depth": None}, "parameters"),
    "depth.capacity_factor": ({"depth": BASE["depth"] | {"capacity_factor": 0.75}}, "logits"),
    "depth.layers": ({"depth": BASE["depth"] | {"layers": [1]}}, "parameters"),
    "depth.modality_factors": (
        {"depth": {"modality_factors": {"text": 0.25, "image": 0.75}, "layers": [0]}},
        "logits",
    ),
    "depth.router_loss": ({"depth": BASE["depth"] | {"router_loss": 0.1}}, "router_loss"),
    "depth.noise": ({"depth": BASE["depth"] | {"noise": True}}, "training"),
    "depth.scope": ({"depth": BASE["depth"] | {"scope": "sequence"}}, "logits"),
    "token_choice": ({"token_choice": {}}, "parameters"),
    "token_choice.top_k": ({"token_choice": {"top_k": 2}}, "logits"),
    "token_choice.data_sparsity": ({"token_choice": {"data_sparsity": 0.6}}, "parameters"),
    "token_choice.capacity_factor": ({"token_choice": {"capacity_factor": 0.5}}, "logits"),
    "token_choice.bias_rate": ({"token_choice": {"bias_rate": 0.1}}, "biases"),
    "token_choice.balance_loss": ({"token_choice": {"balance_loss": 0.1}}, "router_loss"),
    "dim": ({"dim": 32}, "parameters"),
    "layers": ({"layers": 3}, "parameters"),
    "heads": ({"heads": 2}, "logits"),
    "kv_heads": ({"kv_heads": 2}, "parameters"),
    "hidden": ({"hidden": 20}, "parameters"),
    "hidden_multiple": ({"hidden_multiple": 48}, "parameters"),
    "norm": ({"norm": "pre"}, "logits"),
    "norm_epsilon": ({"norm_epsilon": 0.1}, "logits"),
    "query_key_norm": ({"query_key_norm": False}, "parameters"),
    "rope_theta": ({"rope_theta": 50.0}, "logits"),
    "attention_mask": ({"attention_mask": "causal"}, "logits"),
    "dropout": ({"dropout": 0.5}, "training"),
    "tied_embeddings": ({"tied_embeddings": True}, "parameters"),
    "router_noise": ({"router_noise": True}, "training"),
    "experts_implementation": ({"experts_implementation": "batched"}, "modules"),
}


def observe(changes: dict[str, Any]) -> dict[str, Any]:
    """Build a model and run it on two sequences of two documents each."""
    config = ModelConfig.model_validate(BASE | changes)
    model = Transformer(config, make_vocabulary(), (0.5, 0.5))
    model.initialize(0)
    tokens = torch.randint(5, 40, (2, 16), generator=torch.Generator().manual_seed(1))
    documents = torch.arange(16).expand(2, 16) // 8
    found: dict[str, Any] = {
        "parameters": {name: tuple(p.shape) for name, p in model.named_parameters()},
        "modules": str(model),
    }
    for key, training in (("logits", False), ("training", True)):
        torch.manual_seed(0)
        output = model.train(training)(tokens, documents)
        found[key] = output.head.detach()
    found["router_loss"] = output.router_loss is not None
    model.update_biases(torch.cat([torch.zeros(0), *output.loads]))
    found["biases"] = torch.cat([torch.zeros(1), *(each.bias_O for each in model.token_routers())])
    return found


def differs(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return not torch.allclose(one, other, atol=1e-4)
    return one != other


def test_every_key_has_an_entry():
    keys = {
        prefix + key
        for prefix, schema in (
            ("", ModelConfig),
            ("depth.", DepthConfig),
            ("groups.", GroupConfig),
            ("token_choice.", TokenChoiceConfig),
        )
        for key in schema.model_fields
    }
    assert set(CHANGES) == keys


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_the_model(key):
    changes, what = CHANGES[key]
    base: dict[str, Any] = {"token_choice": {}} if key.startswith("token_choice.") else {}
    before, after = observe(base), observe(changes)
    assert differs(before[what], after[what])
    if what == "training":  # and nothing in evaluation
        assert not differs(before["logits"], after["logits"])
    if what == "modules":  # with equal results
        assert before["parameters"] == after["parameters"]
        assert not differs(before["logits"], after["logits"])


def test_an_unchanged_model_is_observed_as_the_same():
    before, after = observe({}), observe({})
    assert not any(differs(before[what], after[what]) for what in before)
