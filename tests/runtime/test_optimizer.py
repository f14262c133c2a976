"""Weight decay and learning rate by parameter; the schedule."""

from itertools import pairwise

import pytest
from pydantic import ValidationError

from moma.model.transformer import ModelConfig, Transformer
from moma.runtime.optimizer import OptimizerConfig, learning_rate, make_optimizers
from moma.vocabulary import Vocabulary

VOCABULARY = Vocabulary(40, 0, 1, 2, 3, 4, tuple(range(5, 21)), 4)


def test_norms_do_not_decay_and_routers_have_their_own_rate():
    model = Transformer(ModelConfig(groups="moe_2t2i", dim=16, heads=2), VOCABULARY, (0.5, 0.5))
    config = OptimizerConfig(weight_decay=0.3, router_rate=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    (optimizer,) = make_optimizers(model, config)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.3), name
            assert group["lr_scale"] == (0.5 if name.endswith(".router.weight") else 1.0), name
    assert seen == set(names.values())
    assert any("query_norm" in name for name in seen)


def test_schedule_rises_then_falls_to_its_final_rate():
    config = OptimizerConfig(learning_rate=2.0, warmup=4, final_ratio=0.1)
    rates = [learning_rate(config, step, 11) for step in range(11)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[-1] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))


def test_cosine_falls_to_its_final_rate_and_is_half_way_in_the_middle():
    config = OptimizerConfig(learning_rate=2.0, warmup=4, final_ratio=0.1, schedule="cosine")
    rates = [learning_rate(config, step, 11) for step in range(11)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[7] == pytest.approx(1.1) and rates[-1] == pytest.approx(0.2)
    assert rates[5] > 2.0 - 1.8 / 6  # above the straight line


def test_wsd_stays_at_the_peak_until_its_last_steps():
    config = OptimizerConfig(
        learning_rate=2.0, warmup=2, final_ratio=0.1, schedule="wsd", decay_steps=3
    )
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([1.0, *[2.0] * 6, 1.4, 0.8, 0.2])
    longer = config.model_copy(update={"decay_steps": 9})  # begins after the warm-up
    rates = [learning_rate(longer, step, 6) for step in range(6)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.4, 0.8, 0.2])


def test_decay_steps_are_of_wsd_only():
    with pytest.raises(ValidationError, match="needs decay_steps"):
        OptimizerConfig(schedule="wsd")
    with pytest.raises(ValidationError, match="only schedule 'wsd' has decay_steps"):
        OptimizerConfig(schedule="cosine", decay_steps=3)


def test_muon_updates_the_matrices_of_attention_and_experts_only():
    model = Transformer(ModelConfig(groups="mod_moe_2t2i", dim=16, heads=2), VOCABULARY, (0.5, 0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    config = OptimizerConfig(algorithm="muon", weight_decay=0.3)
    adamw, muon = make_optimizers(model, config, model.stacked_matrices())
    updated = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert updated | others == set(names.values()) and not updated & others
    kinds = ("query.", "key.", "value.", "output.", ".gate", ".up", ".down")
    for name in names.values():
        is_inner = any(kind in name for kind in kinds) and "auxiliary" not in name
        assert (name in updated) == is_inner, name
    assert all(group["weight_decay"] == 0.3 for group in muon.param_groups)
    matrices = {
        names[id(p)]: each["matrices"] for each in muon.param_groups for p in each["params"]
    }
    assert {name for name in updated if matrices[name] == 2} == {
        name for name in updated if ".experts." in name
    }
