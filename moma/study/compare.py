"""Comparison of runs: loss curves, held-out losses, speed-up, reconstructions and routing."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import Batch
from moma.data.outputs import require_replaceable
from moma.errors import UserError
from moma.evaluate.perplexity import evaluate
from moma.evaluate.token_routing import route_document
from moma.generate.mixed import MixedModel
from moma.model.decoding import prepare_decoding
from moma.model.routing import RoutingName
from moma.model.transformer import Transformer
from moma.runs import Run
from moma.study import figures
from moma.study.documents import documents_fingerprint, warn_of_other_documents
from moma.study.page import Page, captioned, panels, paragraph, tile
from moma.study.routing_drawing import STYLE, draw_routing
from moma.study.speedup import AXES, Axis, speedups, training_seconds, with_seconds
from moma.study.tables import Table, runs_table
from moma.train.recipe import Recipe
from moma.train.restore import (
    has_routing,
    load_run,
    read_run_recipe,
    require_training_data,
)
from moma.vocabulary import Vocabulary

MEASURES = {
    "loss": "loss",
    "loss_text": "text loss",
    "loss_image": "image loss",
    "perplexity_text": "text perplexity",
    "perplexity_image": "image perplexity",
}
# Keys of η in a summary, by what the losses are compared over.
_SPEEDUPS: dict[Axis, str] = {"flops": "speedup", "seconds": "speedup_seconds"}


@dataclass(frozen=True)
class Measured:
    """A run, loaded and evaluated.

    Attributes:
        metrics: log records of pre-training, with `seconds`.
        results: held-out measures by routing: `choice`, and those of `causal` and `auxiliary`
            that the run supports.
    """

    name: str
    run: Run
    model: Transformer
    recipe: Recipe
    metrics: list[dict[str, Any]]
    results: dict[str, dict[str, float | None]]

    @cached_property
    def mixed(self) -> MixedModel:
        """The model with its tokenizers."""
        prepare_decoding(self.model)
        return MixedModel.assemble(
            self.model, self.run.tokenizers, self.recipe.data.sequence_length
        )


def measure(run: Run, quiet: bool = False, name: str | None = None) -> Measured:
    """Load a run and evaluate it with every routing that it supports."""
    model, recipe = load_run(run)
    require_training_data(run, recipe)
    routings = [by for by in _routings(model) if has_routing(model, by)]
    results: dict[str, dict[str, float | None]] = {
        by: evaluate(model, recipe, by, quiet) for by in routings
    }
    own = read_run_recipe(run)
    # The curves are those of pre-training, also for a run that trained only routers.
    log = Run(own.from_) if own.stage == "aux_router" and own.from_ else run
    return Measured(
        name or run.path.name, run, model, recipe, with_seconds(log.read_metrics()), results
    )


def _routings(model: Transformer) -> Sequence[RoutingName]:
    return ("choice", "causal", "auxiliary") if model.config.has_expert_choice else ("choice",)


def summary(measured: Sequence[Measured]) -> dict[str, Any]:
    """Held-out measures of every run, and η of every run against the first, over both axes."""
    first, *others = measured
    return {
        "runs": {each.name: each.results for each in measured},
        **{
            key: {each.name: speedups(first.metrics, each.metrics, axis) for each in others}
            for axis, key in _SPEEDUPS.items()
        },
    }


def comparison_tables(result: dict[str, Any]) -> list[Table]:
    """Tables of a `summary`: held-out measures, and the speed-up of several runs."""
    held_out = Table(
        "Held-out documents",
        "choice: experts choose the best tokens of the batch, as in training; causal: each token "
        "by itself, as in generation; auxiliary: each by auxiliary routers, if they are trained. "
        "Losses in nats per token.",
        ("run", "routing", *MEASURES.values()),
        [
            (name, routing, *(values[key] for key in MEASURES))
            for name, by_routing in result["runs"].items()
            for routing, values in by_routing.items()
        ],
    )
    if not result["speedup"]:
        return [held_out]
    baseline = next(iter(result["runs"]))
    speedup = Table(
        "Speed-up η",
        f"How many times fewer FLOPs, and seconds of training, than {baseline} a run needs for "
        f"{baseline}'s final training loss; a dash if it does not reach it.",
        ("run", "over", "all tokens", "text", "images"),
        [
            (name, axis, *result[key][name].values())
            for name in result["speedup"]
            for axis, key in _SPEEDUPS.items()
        ],
    )
    return [held_out, speedup]


def compare(runs: Sequence[Run], out: Path, quiet: bool = False) -> dict[str, Any]:
    """Measure runs, and write the page.

    Returns:
        The `summary`, and a `warning` of runs that were measured on other documents than the first;
        empty if there are none.

    Raises:
        UserError: a folder is not a run, has no checkpoint or is given twice, or `out` is a file
            that moma did not write.
    """
    require_replaceable(out)
    folders = [run.path.resolve() for run in runs]
    if repeated := [run.path for run in runs if folders.count(run.path.resolve()) > 1]:
        raise UserError(f"{repeated[0]}: given {len(repeated)} times; name each run once")
    names = [run.path.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    measured = [measure(run, quiet, name) for run, name in zip(runs, names, strict=True)]
    warning = warn_of_other_documents(
        {each.name: documents_fingerprint(each.recipe.data) for each in measured}
    )
    page = Page("Comparison of runs", f"{measured[0].name} is the baseline.", STYLE)
    if warning:
        page.add(paragraph(f"{warning}."))
    add_comparison(page, measured)
    page.write(out)
    return summary(measured) | {"warning": warning}


def add_comparison(page: Page, measured: Sequence[Measured]) -> None:
    """Add the sections that every comparison has."""
    metrics = {each.name: [each.metrics] for each in measured}
    for axis, name in AXES.items():
        unit = "FLOPs" if axis == "flops" else "seconds"
        page.section(
            f"Training loss over {name}",
            paragraph(
                f"Smoothed by a line fitted to the records within 25% of each point's {unit}."
            ),
            panels(figures.loss_curves(metrics, axis)),
        )
    for each in comparison_tables(summary(measured)):
        page.add_table(each)
    _add_reconstructions(page, measured[0])
    for number, run in enumerate(measured):
        if run.model.config.has_expert_choice:
            _add_routing(page, run, f"routing-{number}")
    page.add_table(
        runs_table((each.name, each.run.path, training_seconds(each.metrics)) for each in measured)
    )


def _add_reconstructions(page: Page, measured: Measured, count: int = 12) -> None:
    """Add held-out images as the codec reconstructs them."""
    vocabulary = measured.model.vocabulary
    with closing(Batches(measured.recipe.data, vocabulary, seed=0, split="held_out")) as batches:
        codes = (
            image
            for batch in batches
            for sequence in vocabulary.code_of_id[batch.tokens_BS]
            for image in sequence[sequence >= 0].reshape(-1, vocabulary.codes_per_image)
        )
        first = [*islice(codes, count)]
    tiles = [tile(measured.mixed.image(image), "reconstruction") for image in first]
    page.section(
        "What the codec keeps",
        paragraph("Held-out images after encoding to codes and back: the best a model can draw."),
        captioned(tiles, ""),
    )


def _add_routing(page: Page, measured: Measured, name: str, documents: int = 3) -> None:
    """Add, for some held-out documents, the experts of each token."""
    mixed, model = measured.mixed, measured.model
    data = measured.recipe.data
    with closing(Batches(data, model.vocabulary, seed=1, split="held_out")) as batches:
        batch = next(batches)
    found = _documents_with_image(batch, model.vocabulary, documents)
    drawn = [
        draw_routing(mixed, [route_document(model, ids, "choice", batch)], f"{name}-{number}")
        for number, ids in enumerate(found)
    ]
    page.section(f"Which expert took which token: {measured.name}", *drawn)


def _documents_with_image(batch: Batch, vocabulary: Vocabulary, count: int) -> list[np.ndarray]:
    """The ids of the first documents of a batch that contain an image."""
    sequences, columns = np.nonzero(batch.tokens_BS == vocabulary.begin_image)
    documents = batch.document_ids_BS[sequences, columns]
    found = dict.fromkeys(zip(sequences.tolist(), documents.tolist(), strict=True))
    return [
        batch.tokens_BS[sequence][batch.document_ids_BS[sequence] == document]
        for sequence, document in list(found)[:count]
    ]
