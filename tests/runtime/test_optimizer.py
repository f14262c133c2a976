"""Weight decay and learning rate by parameter; the schedule."""

from itertools import pairwise

import pytest

from moma.model.transformer import ModelConfig, Transformer
from moma.runtime.optimizer import OptimizerConfig, learning_rate, make_optimizer
from moma.vocabulary import Vocabulary

VOCABULARY = Vocabulary(40, 0, 1, 2, 3, 4, tuple(range(5, 21)), 4)


def test_norms_do_not_decay_and_routers_have_their_own_rate():
    model = Transformer(ModelConfig(groups="moe_2t2i", dim=16, heads=2), VOCABULARY, (0.5, 0.5))
    config = OptimizerConfig(weight_decay=0.1, router_rate=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in make_optimizer(model, config).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.1), name
            assert group["rate"] == (0.5 if name.endswith(".router.weight") else 1.0), name
    assert seen == set(names.values())
    assert any("query_norm" in name for name in seen)


def test_schedule_rises_then_falls_to_its_final_rate():
    config = OptimizerConfig(learning_rate=2.0, warmup=4, final_ratio=0.1)
    rates = [learning_rate(config, step, 11) for step in range(11)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[-1] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
