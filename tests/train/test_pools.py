"""Training warns if few tokens compete for slots."""

import pytest
import torch

from moma.model.depth import DepthConfig
from moma.runtime.world import World
from moma.train.loop import train
from moma.train.pools import pool_sizes, warn_of_small_pools
from tests.factories import synthetic_recipe


def recipe_of(groups: str, **depth):
    model = {"groups": groups, "depth": DepthConfig(**depth)} if depth else {"groups": groups}
    return synthetic_recipe(16, 0.25, 8192, model=model)


@pytest.mark.parametrize(
    ("groups", "depth", "expected"),
    [
        ("dense", {}, {}),
        ("moe_1t1i", {}, {}),
        ("token_4t4i", {}, {}),
        ("moe_4x", {}, {"experts of text and image": 32768}),
        ("moe_4t1i", {}, {"experts of text": 24576}),
        ("moe_4t4i", {}, {"experts of text": 24576, "experts of image": 8192}),
        ("mod", {}, {"depth routers": 32768}),
        ("mod_token_4t4i", {}, {"depth routers": 32768}),
        ("moe_1t4i", {"capacity_factor": 0.5}, {"experts of image": 4096, "depth routers": 32768}),
        ("mod", {"scope": "sequence"}, {"depth routers": 8192}),
        (
            "mod_moe_4t4i",
            {"modality_factors": {"text": 0.5, "image": 1.0}},
            {"experts of text": 12288, "experts of image": 8192, "depth routers": 8192},
        ),
    ],
)
def test_pools_follow_from_the_recipe(groups, depth, expected):
    assert pool_sizes(recipe_of(groups, **depth)) == expected


def test_one_line_names_the_small_pools_and_what_to_raise(capsys):
    warn_of_small_pools(recipe_of("moe_4t4i"))  # all are large enough
    assert capsys.readouterr().err == ""
    warn_of_small_pools(recipe_of("mod_moe_1t4i"))
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "(2,048 for experts of image)" in line
    assert "raise data.micro_batch_size or data.sequence_length" in line and "scope" not in line
    small = synthetic_recipe(16, 0.25, 64, model={"groups": "mod", "depth": {"scope": "sequence"}})
    warn_of_small_pools(small)
    assert 'model.depth.scope="batch"' in capsys.readouterr().err
    warn_of_small_pools(small.model_copy(update={"stage": "aux_router"}))
    assert capsys.readouterr().err == ""


def test_a_run_warns_when_it_begins_but_not_when_it_resumes(tiny, tmp_path, capsys):
    recipe = tiny.model_copy(update={"run": tmp_path / "run"})
    for expected in (1, 0):
        train(recipe, World(torch.device("cpu")), quiet=True)
        assert capsys.readouterr().err.count("few tokens compete") == expected
