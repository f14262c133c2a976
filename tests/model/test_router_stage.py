"""Auxiliary routers are trained on the frozen model as it is at inference (MoMa §2.4)."""

import torch

from moma.model.architecture import ModelConfig
from moma.model.transformer import Transformer
from moma.train.stages import freeze_for_stage
from moma.train.step import DeviceBatch, router_loss
from tests.factories import make_vocabulary


def loss_of(seed: int, **changes) -> torch.Tensor:
    sizes = {"groups": "mod_moe_2t2i", "dim": 16, "layers": 2, "heads": 2}
    config = ModelConfig.model_validate(sizes | changes)
    model = Transformer(config, make_vocabulary(), (0.5, 0.5)).train()
    model.initialize(0)
    freeze_for_stage(model, trains_routers=True, trains_model=False)
    tokens = torch.randint(5, 40, (4, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16).expand(4, 16)
    torch.manual_seed(seed)
    batch = DeviceBatch(tokens, tokens, torch.zeros_like(tokens), positions)
    return router_loss(model, batch).objective


def test_the_router_stage_uses_neither_noise_nor_dropout():
    expected = loss_of(0)
    for seed in (0, 1):
        assert torch.equal(loss_of(seed, router_noise=True), expected)
        assert torch.equal(loss_of(seed, dropout=0.5), expected)
