"""Counts of operations with and without activation checkpointing."""

from collections import Counter

import pytest
import torch

from moma.model.architecture import ModelConfig
from moma.model.decoder_layer import DecoderLayer
from moma.model.transformer import Transformer
from moma.runtime.recompute import recompute
from tests.factories import OperationCounter, make_vocabulary

VOCABULARY = make_vocabulary(codes=range(20, 40))
PRODUCTS = ("aten.mm.default", "aten.bmm.default", "moma.grouped_product.default")


def calls(groups: str, run: str, how) -> Counter[str]:
    config = ModelConfig.model_validate(
        {"groups": groups, "dim": 16, "layers": 2, "heads": 2, "experts_implementation": run}
    )
    model = Transformer(config, VOCABULARY, (0.5, 0.5))
    model.initialize(0)
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        for part in [layer] if how == "layer" else [layer.attention, layer.experts]:
            recompute(part, how)
    tokens = torch.arange(5, 37).view(2, 16)
    with OperationCounter() as counting:
        model(tokens).head.square().mean().backward()
    return counting.counts


@pytest.mark.parametrize("run", ["sequential", "batched", "grouped"])
@pytest.mark.parametrize("groups", ["moe_2t2i", "mod_moe_1t1i", "null_2t2i"])
def test_selective_computes_no_product_and_no_choice_again(groups, run):
    none, selective, layer = (calls(groups, run, how) for how in ("none", "selective", "layer"))
    for name in (*PRODUCTS, "aten.topk.default"):
        assert selective[name] == none[name], name
    assert selective["aten.silu.default"] > none["aten.silu.default"]
    # Only groups of one expert are computed in a grouped product.
    experts = PRODUCTS[2] if (run, groups) == ("grouped", "mod_moe_1t1i") else PRODUCTS[1]
    assert layer[experts] > none[experts] > 0
