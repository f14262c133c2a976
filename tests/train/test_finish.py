"""The last steps route by thresholds: `finish`, from a recipe to the log, also after a restart."""

import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from moma.model.depth import DepthConfig
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.world import World
from moma.train.loop import train
from moma.train.metrics import TIMING_KEYS
from moma.train.recipe import Recipe, RouterStageConfig, StageConfig

WORLD = World(torch.device("cpu"))


def with_finish(tiny: Recipe, run: Path, finish: float) -> Recipe:
    stage = tiny.pretrain.model_copy(
        update={"finish": finish, "checkpoint_every": 2, "keep_checkpoints": 9}
    )
    # Not in layer 0, where equal ids have equal scores.
    changes = {"groups": "mod_moe_2t2i", "depth": DepthConfig(layers=(1,)), "router_noise": True}
    model = tiny.model.model_copy(update=changes)
    return tiny.model_copy(update={"run": run, "model": model, "pretrain": stage})


def records_of(run: Run) -> list[dict]:
    return [{k: v for k, v in each.items() if k not in TIMING_KEYS} for each in run.read_metrics()]


def test_the_last_steps_route_by_thresholds(tiny, tmp_path):
    """Of eight steps the last four; interrupted before, at and after the first of them."""
    plain = records_of(train(with_finish(tiny, tmp_path / "plain", 0.0), WORLD, quiet=True))
    recipe = with_finish(tiny, tmp_path / "run", 0.5)
    run = train(recipe, WORLD, quiet=True)
    records = records_of(run)
    assert records[:2] == plain[:2]
    for before, after in zip(plain[2:], records[2:], strict=True):
        assert before["loss"] != after["loss"]
    for record in records:
        for router in record["routers"].values():
            assert ("excess" in router) == (record["step"] > 4)
    assert any(router["excess"] for router in records[-1]["routers"].values())
    for done in (2, 4, 6):
        for path in checkpoints_in(run.checkpoints):
            if int(path.name.removeprefix("step-")) > done:
                shutil.rmtree(path)
        torch.manual_seed(done)
        train(recipe, WORLD, quiet=True)
        assert records_of(run) == records


def test_the_number_of_last_steps_is_rounded():
    last = {finish: StageConfig(steps=10, finish=finish) for finish in (0.0, 0.1, 0.25, 0.99)}
    found = {
        finish: [step for step in range(1, 11) if config.routes_by_threshold(step)]
        for finish, config in last.items()
    }
    assert found == {0.0: [], 0.1: [10], 0.25: [9, 10], 0.99: list(range(1, 11))}


@pytest.mark.parametrize("values", [{"finish": 0.1}, {"auxiliary_routers": True}])
def test_the_stage_of_auxiliary_routers_has_some_keys_less(values):
    with pytest.raises(ValidationError, match=r"leave (finish|it) out"):
        RouterStageConfig.model_validate(values)


def test_dense_models_have_no_auxiliary_routers(tiny):
    values = tiny.model_dump(by_alias=True)
    values["model"] = {"groups": "dense"}
    values["pretrain"]["auxiliary_routers"] = True
    with pytest.raises(ValidationError, match="'dense' has none"):
        Recipe.model_validate(values)
