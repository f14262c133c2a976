"""Chameleon → MoMa: a folder of `transformers`, imported, upcycled and trained."""

import json

import pytest
import torch

from moma.data.encode.prepare import prepare
from moma.hub.chameleon import import_chameleon
from moma.hub.chameleon_format import model_config, read_port_config
from moma.model.upcycling import match_groups
from moma.recipe import check, override, read_recipe, shipped_recipe
from moma.runs import Run
from moma.runtime.world import World
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.restore import load_run
from tests.hub.chameleon_port import random_port, save

pytest.importorskip("transformers")


@pytest.mark.parametrize("swin", [False, True], ids=["7B", "34B"])
def test_a_chameleon_of_transformers_is_upcycled_and_trains(swin, tiny, tmp_path):
    seed = Run(tmp_path / "seed")
    import_chameleon(save(random_port(swin_norm=swin), tmp_path / "port", "200KB"), seed)
    values = tiny.model_dump(mode="json", by_alias=True, exclude_none=True)
    values |= {"model": load_run(seed)[1].model.model_dump(mode="json", exclude_none=True)}
    changes = [
        f"data.path={tmp_path / 'data'}",
        f"data.tokenizers={seed.path}",
        "data.sequence_length=128",
        "data.image_share=0.5",
        f"run={tmp_path / 'run'}",
        f"from={seed.path}",
        "stage=upcycle",
        "model.groups=moe_2t2i",
        "upcycle.steps=2",
        "upcycle.log_every=1",
        "upcycle.checkpoint_every=2",
        "upcycle.compile=false",
        "upcycle.optimizer.warmup=0",
        "upcycle.optimizer.learning_rate=1e-3",
    ]
    recipe = check(Recipe, override(values, changes), "upcycled")
    prepare(recipe, torch.device("cpu"), quiet=True)
    run = train(recipe, World(torch.device("cpu")), quiet=True)
    first, last = run.read_metrics()
    assert last["step"] == 2 and first["loss_text"] and first["loss_image"]
    before, after = (load_run(each)[0].state_dict() for each in (seed, run))
    # Two steps of 1e-3 change a weight by at most 2e-3, and the decay's part of it.
    torch.testing.assert_close(
        after["embedding.weight"], before["embedding.weight"], atol=3e-3, rtol=1e-3
    )
    assert not torch.equal(after["embedding.weight"], before["embedding.weight"])
    dense_FD = before["layers.0.experts.groups.0.feed_forward.gate.weight"]
    for group in range(2):
        stacked = after[f"layers.0.experts.groups.{group}.gate"]
        for expert_DF in stacked.chunk(2):
            torch.testing.assert_close(expert_DF, dense_FD.T, atol=3e-3, rtol=1e-3)


def test_the_recipe_for_7b_fits_its_configuration(tmp_path):
    """The released `config.json` has these values, which are the defaults of `transformers`."""
    from transformers import ChameleonConfig

    values = ChameleonConfig(vocabulary_map={"<image>": 0}).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    seed = model_config(read_port_config(tmp_path), "config.json")
    recipe = read_recipe(Recipe, shipped_recipe("upcycle_chameleon_7b.toml"))
    assert recipe.model == seed.model_copy(update={"groups": "moe_2t2i"})
    assert match_groups(seed.group_list, recipe.model.group_list) == [0, 0]
    assert recipe.stage == "upcycle"
