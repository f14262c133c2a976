"""Thresholds are kept while training, on any number of ranks, and computed by `calibrate`."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.model.depth import DepthConfig
from moma.model.routers import CUTOFF_DECAY, AuxiliaryRouter
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
    return [router.cutoffs_3E.flatten().tolist() for router in model.routers()]


def take_steps(world: World, recipe: Recipe, micro_batches: int, out: Path) -> None:
    """Take two steps on the same micro-batches, whatever the number of ranks; one finishes."""
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, world)
    data = Batches(recipe.data, vocabulary, recipe.seed)
    step = make_step(recipe, model, world)
    for finishes in (False, True):
        batches = list(itertools.islice(data, micro_batches * world.size))
        step(batches[world.rank :: world.size], 1e-2, finishes=finishes)
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


def test_thresholds_are_the_mean_cuts_of_all_micro_batches(tiny):
    recipe = with_depth(tiny)
    vocabulary = Vocabulary.load(recipe.data.path / "vocabulary.json")
    model = prepare_model(recipe, vocabulary, WORLD)
    step, data = make_step(recipe, model, WORLD), Batches(recipe.data, vocabulary, recipe.seed)
    steps = 3
    found: list[tuple[float, list[float]]] = []  # weight and cutoffs of each micro-batch
    for number in range(steps):
        batches = list(itertools.islice(data, 2))
        for batch in batches:
            on_device = to_device(batch, WORLD.device)
            with torch.no_grad():
                cutoffs = run_model(model, on_device, Routing(), no_head).cutoffs
            found.append((CUTOFF_DECAY ** (steps - number), torch.cat(cutoffs).tolist()))
        step(batches, 1e-2)
    thresholds = torch.cat([router.threshold_E for router in model.routers()]).tolist()
    for expert, threshold in enumerate(thresholds):
        finite = [(w, cutoffs[expert]) for w, cutoffs in found if math.isfinite(cutoffs[expert])]
        weight = sum(w for w, _ in finite)
        expected = -math.inf
        if weight > sum(w for w, _ in found) / 2:
            expected = sum(w * cut for w, cut in finite) / weight
        assert threshold == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert any(map(math.isfinite, thresholds))


def test_calibration_replaces_thresholds_without_training(tiny, tmp_path):
    run = train(with_depth(tiny).model_copy(update={"run": tmp_path / "run"}), WORLD, quiet=True)
    kept, _ = load_run(run)
    assert kept.has_thresholds
    require_routing(run, kept)
    calibrate(run, 5, quiet=True)
    calibrated, _ = load_run(run)
    assert cutoffs_of(calibrated) != cutoffs_of(kept)
    for name, parameter in kept.named_parameters():
        assert torch.equal(parameter, calibrated.get_parameter(name))
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
