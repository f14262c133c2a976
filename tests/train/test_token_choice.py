"""Runs of models that are causal by construction: losses, metrics, evaluation, generation."""

from pathlib import Path

import pytest
import torch

from moma.errors import UserError
from moma.evaluate.perplexity import evaluate
from moma.runs import Run
from moma.runtime.world import World
from moma.study.measures import measure_routing
from moma.train.calibrate import calibrate
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.restore import load_run, require_routing

WORLD = World(torch.device("cpu"))
# Text and image loss of the last logged step.
GOLDEN = {"token_2t2i": (4.7370, 3.5209), "null_4x": (4.8556, 3.7119)}


def train_run(tiny: Recipe, groups: str, path: Path) -> Run:
    model = tiny.model.model_copy(update={"groups": groups})
    return train(tiny.model_copy(update={"model": model, "run": path}), WORLD, quiet=True)


@pytest.fixture(scope="module", params=GOLDEN)
def run(request, tiny, tmp_path_factory):
    return train_run(tiny, request.param, tmp_path_factory.mktemp(request.param) / "run")


def test_golden_losses(run):
    """Change the numbers only for a documented reason; see `test_loop.py`."""
    first, *_, last = run.read_metrics()
    golden = GOLDEN[run.path.parent.name.rstrip("0123456789")]
    assert (last["loss_text"], last["loss_image"]) == pytest.approx(golden, abs=0.02)
    assert last["loss"] < first["loss"]


def test_dropped_tokens_and_experts_per_token_are_logged(run):
    for router in run.read_metrics()[-1]["routers"].values():
        assert 0 <= router["dropped_fraction"] < 0.5
        assert all(0 < number <= 2 for number in router["experts_per_token"].values())


def test_the_loaded_model_is_causal_without_further_training(run):
    model, recipe = load_run(run)
    biased = any(bool(router.bias_O.any()) for router in model.token_routers())
    assert biased == (recipe.model.groups == "token_2t2i")
    require_routing(run, model)
    causal, choice = (evaluate(model, recipe, name, quiet=True) for name in ("causal", "choice"))
    assert causal == choice
    for name in ("auxiliary", "threshold"):
        with pytest.raises(UserError, match="causal by construction"):
            require_routing(run, model, name)
    with pytest.raises(UserError, match="needs no thresholds"):
        calibrate(run, 1, quiet=True)
    stage = {"stage": "aux_router", "from_": run.path, "run": run.path / "aux_router"}
    with pytest.raises(UserError, match="no auxiliary routers to train"):
        train(recipe.model_copy(update=stage), WORLD, quiet=True)


def test_only_depth_routers_select_over_the_batch(tiny, tmp_path):
    run = train_run(tiny, "mod_token_2t2i", tmp_path / "run")
    model, _ = load_run(run)
    assert model.has_thresholds and len(list(model.routers())) == 1
    for name in ("choice", "threshold"):
        require_routing(run, model, name)
    agreement = measure_routing(run, 1)["agreement"]
    assert set(agreement) == {"0.depth text", "0.depth image"}
