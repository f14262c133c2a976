"""Thresholds are kept while training, on any number of ranks, and computed by `calibrate`."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.model.depth import DepthConfig
from moma.model.routers import AuxiliaryRouter, Router
from moma.model.routing import Routing
from moma.model.transformer import no_head
from moma.runtime.world import World
from moma.train.calibrate import calibrate
from moma.train.loop import train
from moma.train.recipe import Recipe
from moma.train.restore import load_run, require_routing
from moma.train.stages import make_step, prepare_model
from moma.train.step import run_model, to_device
from moma.train.thresholds import thresholds_file
from moma.vocabulary import Vocabulary
from tests.processes import on_ranks

WORLD = World(torch.device("cpu"))


def cutoffs_of(model) -> list[list[float]]:
    return [router.cutoff_means_3E.flatten().tolist() for router in model.routers()]


def take_steps(world: World, recipe: Recipe, micro_batches: int, out: Path) -> None:
    """Take two steps on the same micro-batches, whatever the number of ranks; one by threshold."""
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, world)
    data = Batches(recipe.data, vocabulary, recipe.seed)
    step = make_step(recipe, model, world)
    for by_threshold in (False, True):
        batches = list(itertools.islice(data, micro_batches * world.size))
        step(batches[world.rank :: world.size], 1e-2, by_threshold=by_threshold)
    if world.rank == 0:
        (out / f"{world.size}.json").write_text(json.dumps(cutoffs_of(model)))


def with_depth(tiny: Recipe) -> Recipe:
    """Not in layer 0, where equal ids have equal scores, so that a choice may be arbitrary."""
    changes = {"groups": "mod_moe_2t2i", "depth": DepthConfig(layers=(1,))}
    return tiny.model_copy(update={"model": tiny.model.model_copy(update=changes)})


def test_two_ranks_have_the_thresholds_of_one(tiny, tmp_path):
    recipe = with_depth(tiny)
    take_steps(WORLD, recipe, 2, tmp_path)
    on_ranks(2, take_steps, recipe, 1, tmp_path)
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert len(one) == 5 and one == [pytest.approx(cutoffs, rel=1e-4, abs=1e-6) for cutoffs in two]


def find_cutoffs(model, batches) -> list[list[float]]:
    """Of each micro-batch, the cutoffs of all routers."""
    found = []
    for batch in batches:
        with torch.no_grad():
            output = run_model(model, to_device(batch, WORLD.device), Routing(), no_head)
        found.append(torch.cat([*output.cutoffs]).tolist())
    return found


def require_mean(model, cutoffs: list[list[float]]) -> None:
    """The thresholds are the means of the finite ones; −∞ if these are not the majority."""
    thresholds = torch.cat([router.threshold_E for router in model.routers()]).tolist()
    for expert, threshold in enumerate(thresholds):
        finite = [each[expert] for each in cutoffs if math.isfinite(each[expert])]
        is_mostly_finite = 2 * len(finite) > len(cutoffs)
        expected = sum(finite) / len(finite) if is_mostly_finite else -math.inf
        assert threshold == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert any(map(math.isfinite, thresholds))


def test_thresholds_of_a_step_are_the_mean_cuts_of_its_micro_batches(tiny):
    recipe = with_depth(tiny)
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, WORLD)
    step, data = make_step(recipe, model, WORLD), Batches(recipe.data, vocabulary, recipe.seed)
    batches = list(itertools.islice(data, 3))
    cutoffs = find_cutoffs(model, batches)
    step(batches, 1e-2)
    require_mean(model, cutoffs)


@pytest.mark.parametrize(("steps", "averaged"), [(5, 1), (200, 20), (1000, 100), (4000, 100)])
def test_thresholds_average_the_last_tenth_of_the_steps(steps, averaged):
    """Behind a cutoff that rises by one per step, a mean over T steps lags T - 1."""
    router = Router(dim=4, outputs=1)
    for step in range(steps):
        router.update_cutoffs(torch.tensor([[float(step)], [1.0]]))
    assert steps - 1 - float(router.threshold_E) == pytest.approx(averaged - 1, rel=0.15)


def test_calibration_replaces_thresholds_without_training(tiny, tmp_path):
    run = train(with_depth(tiny).model_copy(update={"run": tmp_path / "run"}), WORLD, quiet=True)
    kept, _ = load_run(run)
    assert kept.has_thresholds
    require_routing(run, kept)
    calibrate(run, 5, quiet=True)
    calibrated, recipe = load_run(run)
    batches = itertools.islice(Batches(recipe.data, kept.vocabulary, recipe.seed), 5)
    require_mean(calibrated, find_cutoffs(kept, batches))
    assert cutoffs_of(calibrated) != cutoffs_of(kept)
    for name, parameter in kept.named_parameters():
        assert torch.equal(parameter, calibrated.get_parameter(name))
    # A file of another version counts as none.
    with safe_open(thresholds_file(run), "pt") as file:
        renamed = {f"{name}_2": file.get_tensor(name) for name in list(file.keys())}
        metadata = file.metadata()
    save_file(renamed, thresholds_file(run), metadata)
    assert cutoffs_of(load_run(run)[0]) == cutoffs_of(kept)
    thresholds_file(run).write_bytes(b"damaged")
    with pytest.raises(UserError, match="moma calibrate"):
        load_run(run)


def test_most_micro_batches_without_a_cut_let_all_tokens_pass(tiny):
    model = with_depth(tiny).build_model(Vocabulary.load(tiny.data.path / "vocabulary.json"))
    router = next(model.routers())
    for cut, finite in ((1.0, 1.0), (0.0, 0.0), (0.0, 0.0)):
        router.update_cutoffs(torch.tensor([[cut] * 2, [finite] * 2]))
    assert router.threshold_E.tolist() == [-torch.inf] * 2
    assert not model.has_thresholds


def test_auxiliary_routers_compute_in_fp32_under_autocast():
    torch.manual_seed(0)
    router, x_ND = AuxiliaryRouter(16, 3), torch.randn(5, 16)
    expected = router(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x_ND)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
