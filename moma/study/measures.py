"""What a study measures of a finished run, on the same held-out micro-batches for all its runs.

`held_out`: losses under each routing that the run can use. `routing`: what causal routing changes;
see `measure_routing`. `scores`: see `measure_scores`. `perplexity`, `captions` and `retrieval`:
suites of `moma evaluate`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import NO_LABEL, Batch
from moma.evaluate.perplexity import sum_losses
from moma.evaluate.suite import run_suite
from moma.generate.mixed import MixedModel
from moma.model.routers import RouterRecord
from moma.model.routing import ROUTINGS, ExpertChoice, Noisy, Routing, Threshold
from moma.model.transformer import Transformer, no_head
from moma.runs import Run
from moma.runtime.world import World
from moma.train.metrics import mean_losses
from moma.train.recipe import Recipe
from moma.train.restore import has_routing, load_run, require_routing, require_training_data
from moma.train.statistics import router_names
from moma.train.step import DeviceBatch, run_model, to_device
from moma.vocabulary import IMAGE, TEXT

# Of a run, on so many held-out micro-batches (0: all): figures by name, at any depth.
Measure = Callable[[Run, int], dict[str, Any]]

# Suites that need no other documents than those of the run.
HELD_OUT_SUITES = ("perplexity", "captions", "retrieval")
FLIP_RATES = (0.0025, 0.005, 0.01, 0.05)
# Seed of the order of held-out documents, on which expert choice depends.
_ORDER = 0


def measure_held_out(run: Run, batches: int = 0) -> dict[str, Any]:
    """Losses by modality under each routing that the run can use; `all` if there is one only."""
    model, recipe = _load(run)
    return {name: losses(model, recipe, by, batches) for name, by in _routings(model).items()}


def measure_routing(run: Run, batches: int = 0) -> dict[str, Any]:
    """What causal routing changes, compared with expert choice over the micro-batch.

    Returns:
        `losses`: with thresholds of the experts and expert choice of the depth routers, and the
        reverse (`choice depth`, `choice experts`); and with decisions of the depth routers (without
        these, of the experts) inverted at random with some rates (§4.6; `flips RATE`).
        `agreement`: of each router with thresholds and each modality, the share of decisions on
        eligible tokens that thresholds (and trained auxiliary routers) make as expert choice does,
        for the same logits.
        `taken`: of each kind of router, the experts per eligible token under thresholds, for
        documents as they are (`mixed`), those without images (`text`), and images without their
        text (`image`).
    """
    model, recipe = _load(run)
    if not model.config.has_expert_choice or not model.has_thresholds:
        return {}
    choice, threshold = ExpertChoice("actual"), Threshold()
    routings: dict[str, Routing] = {}
    if model.config.depth_layers:
        routings["choice depth"] = Routing(threshold, choice)
        routings["choice experts"] = Routing(choice, threshold)
    for rate in FLIP_RATES:
        flipped = Noisy(threshold, rate)
        by = Routing(threshold, flipped) if model.config.depth_layers else Routing(flipped)
        routings[f"flips {rate:.2%}"] = by
    torch.manual_seed(0)  # of the flips
    return {
        "losses": {name: losses(model, recipe, by, batches) for name, by in routings.items()},
        "agreement": _agreement(model, recipe, batches),
        "taken": _taken(model, recipe, batches),
    }


@torch.no_grad()
def measure_scores(run: Run, batches: int = 0) -> dict[str, dict[str, float]]:
    """Mean score that each expert, or depth router, gives to the tokens of a modality.

    Returns:
        By router and modality, such as `3.text+image text`, then by number of the expert: the mean
        over the tokens that the router chooses from, routed as in training.
    """
    model, recipe = _load(run)
    routing = model.named_routing("choice", record_selection=True)
    names = model.vocabulary.modalities
    # Sums over tokens of the scores of each expert, and the number of tokens: [E + 1].
    sums: dict[str, Tensor] = {}
    with _held_out(model, recipe, batches) as held_out:
        for batch in held_out:
            on_device = _on_device(model, batch)
            modality_N = model.modality_of_id[on_device.tokens_BS].flatten()
            records = _records(model, on_device, routing)
            for name, record in zip(router_names(model), records, strict=True):
                for modality in (TEXT, IMAGE):
                    here_N = record.eligible_N & (modality_N == modality)
                    score_NE = record.logits_NE[here_N].double().sigmoid()
                    part = torch.cat((score_NE.sum(0), here_N.sum()[None])).cpu()
                    key = f"{name} {names[modality]}"
                    sums[key] = sums[key] + part if key in sums else part
    return {
        name: {str(e): total / tokens for e, total in enumerate(totals)}
        for name, (*totals, tokens) in ((name, each.tolist()) for name, each in sums.items())
        if tokens
    }


def measure_suite(suite: str, run: Run, batches: int = 0) -> dict[str, Any]:
    """A suite on all held-out documents and on those of each source, under causal routing.

    Args:
        suite: one of `HELD_OUT_SUITES`.
        batches: has no effect.
    """
    model, recipe = _load(run)
    require_routing(run, model, "causal")
    mixed = MixedModel.assemble(model, run.tokenizers, recipe.data.sequence_length)
    world = World(model.embedding.weight.device)
    rows = run_suite(suite, mixed, recipe.data, world, quiet=True)["sources"]
    return {
        source: {
            name: value and value["value"] for name, value in row.items() if name != "documents"
        }
        for source, row in rows.items()
    }


MEASURES: Mapping[str, Measure] = {
    "held_out": measure_held_out,
    "routing": measure_routing,
    "scores": measure_scores,
    **{suite: partial(measure_suite, suite) for suite in HELD_OUT_SUITES},
}


def losses(
    model: Transformer, recipe: Recipe, routing: Routing, batches: int
) -> dict[str, float | None]:
    """Mean held-out losses in nats per target, overall and by modality.

    Raises:
        UserError: there are no held-out documents.
    """
    with _held_out(model, recipe, batches) as held_out:
        return mean_losses(*sum_losses(model, recipe, routing, held_out))


def _routings(model: Transformer) -> dict[str, Routing]:
    if not model.config.has_expert_choice:
        return {"all": model.named_routing("choice")}
    return {name: model.named_routing(name) for name in ROUTINGS if has_routing(model, name)}


def _load(run: Run) -> tuple[Transformer, Recipe]:
    model, recipe = load_run(run)
    require_training_data(run, recipe)
    return model, recipe


@contextmanager
def _held_out(model: Transformer, recipe: Recipe, batches: int) -> Iterator[Iterator[Batch]]:
    data = recipe.data
    with closing(Batches(data, model.vocabulary, _ORDER, split="held_out")) as found:
        yield islice(found, batches or None)


def _on_device(model: Transformer, batch: Batch) -> DeviceBatch:
    return to_device(batch, model.embedding.weight.device)


def _records(model: Transformer, batch: DeviceBatch, routing: Routing) -> list[RouterRecord]:
    return run_model(model, batch, routing, no_head).routers


@torch.no_grad()
def _agreement(model: Transformer, recipe: Recipe, batches: int) -> dict[str, dict[str, Any]]:
    has_auxiliary = has_routing(model, "auxiliary")
    flag = "record_auxiliary" if has_auxiliary else "record_selection"
    routing = model.named_routing("choice", **{flag: True})
    thresholds = [router.threshold_E for router in model.routers()]
    # [agreeing by thresholds, agreeing by auxiliary routers, all], by router and modality
    counts: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    with _held_out(model, recipe, batches) as held_out:
        for batch in held_out:
            on_device = _on_device(model, batch)
            modality_N = model.modality_of_id[on_device.tokens_BS].flatten()
            records = _records(model, on_device, routing)
            found = list(zip(router_names(model), records, strict=True))
            if model.config.token_choice_config is not None:  # only depth routers have thresholds
                found = [(name, record) for name, record in found if record.kind == "depth"]
            for (name, record), threshold_E in zip(found, thresholds, strict=True):
                chosen_NE = record.selected_NE.bool()
                by_auxiliary_NE = torch.zeros_like(chosen_NE)
                if record.auxiliary_logits_NE is not None:
                    by_auxiliary_NE = (record.auxiliary_logits_NE > 0) == chosen_NE
                for modality in (TEXT, IMAGE):
                    # A depth router may have a threshold for each modality.
                    of_modality = len(threshold_E) > chosen_NE.shape[1]
                    own_E = threshold_E[modality, None] if of_modality else threshold_E
                    by_threshold_NE = (record.logits_NE > own_E) == chosen_NE
                    here_N = record.eligible_N & (modality_N == modality)
                    parts = (by_threshold_NE, by_auxiliary_NE, torch.ones_like(chosen_NE))
                    sums = [part_NE[here_N].sum() for part_NE in parts]
                    counts[name, modality] += torch.stack(sums).double().cpu()
    names = model.vocabulary.modalities
    return {
        f"{router} {names[modality]}": {
            "threshold": float(by_threshold / total),
            "auxiliary": float(by_auxiliary / total) if has_auxiliary else None,
        }
        for (router, modality), (by_threshold, by_auxiliary, total) in counts.items()
        if total
    }


@torch.no_grad()
def _taken(model: Transformer, recipe: Recipe, batches: int) -> dict[str, dict[str, float]]:
    parts: dict[str, Callable[[Transformer, Batch], Batch]] = {
        "mixed": lambda model, batch: batch,
        "text": _without_image_documents,
        "image": _only_images,
    }
    routing = model.named_routing("threshold", record_selection=True)
    found: dict[str, dict[str, float]] = {}
    for part, select in parts.items():
        counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        with _held_out(model, recipe, batches) as held_out:
            for batch in held_out:
                records = _records(model, _on_device(model, select(model, batch)), routing)
                for name, record in zip(router_names(model), records, strict=True):
                    kind = name.partition(".")[2]
                    pair = torch.stack((record.selected_NE.sum(), record.eligible_N.sum()))
                    counts[kind] += pair.double().cpu()
        found[part] = {
            kind: float(taken / eligible) for kind, (taken, eligible) in counts.items() if eligible
        }
    return found


def _without_image_documents(model: Transformer, batch: Batch) -> Batch:
    """The micro-batch with padding instead of every piece of a document with an image in it."""
    is_image_BS = batch.tokens_BS == model.vocabulary.begin_image
    keep_BS = np.ones_like(is_image_BS)
    for ids_S, is_image_S, keep_S in zip(batch.document_ids_BS, is_image_BS, keep_BS, strict=True):
        keep_S &= ~np.isin(ids_S, ids_S[is_image_S])
    return _keep(model, batch, keep_BS)


def _only_images(model: Transformer, batch: Batch) -> Batch:
    """The micro-batch with padding instead of every token that is not an image's."""
    modality_BS = model.modality_of_id.cpu().numpy()[batch.tokens_BS]
    return _keep(model, batch, modality_BS == IMAGE)


def _keep(model: Transformer, batch: Batch, keep_BS: np.ndarray) -> Batch:
    return replace(
        batch,
        tokens_BS=np.where(keep_BS, batch.tokens_BS, model.vocabulary.padding),
        labels_BS=np.where(keep_BS, batch.labels_BS, NO_LABEL),
        document_ids_BS=np.where(keep_BS, batch.document_ids_BS, -1),
    )
