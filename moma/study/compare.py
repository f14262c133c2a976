"""Runs side by side: loss curves, held-out losses, speed-up, reconstructions and routing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from moma.data.batches.iterator import Batches
from moma.evaluate.perplexity import evaluate
from moma.generate.mixed import MixedModel
from moma.model.routing import Routing
from moma.model.transformer import Transformer
from moma.runs import Run
from moma.study import figures
from moma.study.page import Page, captioned, coloured, figure, paragraph, table, tile
from moma.study.speedup import speedups
from moma.study.tables import Table
from moma.train.recipe import Recipe
from moma.train.restore import has_causal_routing, load_run, read_run_recipe, with_routers
from moma.train.step import to_device
from moma.vocabulary import IMAGE, TEXT

MEASURES = {
    "loss": "loss",
    "loss_text": "of text",
    "loss_image": "of images",
    "perplexity_text": "perplexity of text",
    "perplexity_image": "of images",
}


@dataclass(frozen=True)
class Measured:
    """A run, loaded and measured.

    Attributes:
        name: of the run folder.
        metrics: its log.
        results: held-out measures by routing: `choice`, and `causal` if the run can do that.
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
        return MixedModel.assemble(
            self.model, self.run.tokenizers, self.recipe.data.sequence_length
        )


def measure(run: Run, quiet: bool = False, name: str | None = None) -> Measured:
    """ExpertInputs a run and evaluate it with every routing that it can do."""
    model, recipe = load_run(run)
    routings = ("choice", "causal") if has_causal_routing(run, model) else ("choice",)
    results = {by: evaluate(model, recipe, by, quiet) for by in routings}  # type: ignore[arg-type]
    own = read_run_recipe(run)
    # The curves are those of pre-training, also for a run that trained routers alone.
    log = Run(own.from_) if own.stage == "aux_router" and own.from_ else run
    return Measured(name or run.path.name, run, model, recipe, log.read_metrics(), results)


def summary(measured: Sequence[Measured]) -> dict[str, Any]:
    """Held-out measures of every run, and η of every run against the first."""
    first, *others = measured
    return {
        "runs": {each.name: each.results for each in measured},
        "speedup": {each.name: speedups(first.metrics, each.metrics) for each in others},
    }


def comparison_tables(result: dict[str, Any]) -> list[Table]:
    """What `summary` found, as tables for people: held-out measures, speed-up if there is one."""
    held_out = Table(
        "Held-out documents",
        "choice: experts choose the best tokens of the batch, as in training; causal: auxiliary "
        "routers decide each token by itself, as in generation. Losses in nats a token.",
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
        f"How many times fewer FLOPs than {baseline} a run needs for {baseline}'s final training "
        "loss; a dash where it does not get there.",
        ("run", "all tokens", "text", "images"),
        [(name, *values.values()) for name, values in result["speedup"].items()],
    )
    return [held_out, speedup]


def compare(runs: Sequence[Run], out: Path, quiet: bool = False) -> dict[str, Any]:
    """Measure runs, write the page, and return the figures (see `summary`).

    Raises:
        UserError: a folder is no run or has no checkpoint.
    """
    names = [run.path.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.path) for run in runs]
    measured = [measure(run, quiet, name) for run, name in zip(runs, names, strict=True)]
    page = Page("Comparison of runs", f"{measured[0].name} is the baseline.")
    add_comparison(page, measured)
    page.write(out)
    return summary(measured)


def add_comparison(page: Page, measured: Sequence[Measured]) -> None:
    """Add the sections that every comparison has."""
    page.section(
        "Training loss over compute",
        paragraph("Each point is the mean over the last 5% of the run before it."),
        figure(figures.loss_curves({each.name: each.metrics for each in measured})),
    )
    for each in comparison_tables(summary(measured)):
        page.section(each.title, paragraph(each.explanation), table(each))
    add_reconstructions(page, measured[0])
    for run in measured:
        if with_routers(run.run) != run.run or run.recipe.stage == "aux_router":
            add_routing(page, run)


def add_reconstructions(page: Page, measured: Measured, count: int = 12) -> None:
    """Held-out images as the codec draws them from their codes."""
    mixed, vocabulary = measured.mixed, measured.model.vocabulary
    images: list[Image.Image] = []
    for batch in Batches(measured.recipe.data, vocabulary, seed=0, split="held_out"):
        codes = vocabulary.code_of_id[batch.tokens_BS]
        for row in codes:
            grids = row[row >= 0].reshape(-1, vocabulary.codes_per_image)
            images += [mixed.image(codes_of_one) for codes_of_one in grids]
        if len(images) >= count:
            break
    page.section(
        "What the codec keeps",
        paragraph("Held-out images after encoding to codes and back: the best a model can draw."),
        captioned([tile(image, "reconstruction") for image in images[:count]], ""),
    )


def add_routing(page: Page, measured: Measured, documents: int = 3) -> None:
    """For some held-out documents, which expert took which token."""
    mixed, vocabulary = measured.mixed, measured.model.vocabulary
    batch = next(iter(Batches(measured.recipe.data, vocabulary, seed=1, split="held_out")))
    on_device = to_device(batch, measured.model.embedding.weight.device)
    routing = Routing(capacity="actual", record_auxiliary=True)
    with torch.no_grad():
        output = measured.model(on_device.tokens, on_device.documents, on_device.positions, routing)
    parts = [
        paragraph(
            "Batch choice. Above, the image once for each layer and image expert: codes that the "
            "expert did not take are dimmed. Below, the text of the last layer: each colour is a "
            "text expert that took the token; no colour, nobody did."
        )
    ]
    for row, piece in _pieces_with_image(
        batch.documents_BS, batch.tokens_BS, vocabulary, documents
    ):
        here = np.flatnonzero((batch.documents_BS == piece)[row]) + row * batch.tokens_BS.shape[1]
        tokens = batch.tokens_BS.reshape(-1)[here]
        is_image = vocabulary.modality_of_id[tokens] == IMAGE
        for modality in (IMAGE, TEXT):
            places = here[is_image == (modality == IMAGE)]
            chosen_LEn = _chosen(output.routers, modality, places, on_device.tokens, measured.model)
            if chosen_LEn is None:
                continue
            if modality == IMAGE:
                side = mixed.codec.config.codes_per_side
                codes = vocabulary.code_of_id[tokens[is_image]][: side * side]
                maps = chosen_LEn[:, :, : side * side].reshape(*chosen_LEn.shape[:2], side, side)
                parts.append(figure(figures.expert_maps(mixed.image(codes), maps)))
            else:
                parts.append(coloured(_text_pieces(mixed, tokens[~is_image], chosen_LEn[-1])))
    page.section(f"Which expert took which token: {measured.name}", *parts)


def _pieces_with_image(
    documents_BS: np.ndarray, tokens_BS: np.ndarray, vocabulary: Any, count: int
) -> list[tuple[int, int]]:
    """(row, piece) of the first pieces of a batch that hold an image."""
    rows, columns = np.nonzero(tokens_BS == vocabulary.begin_image)
    found = dict.fromkeys(
        (int(row), int(documents_BS[row, column]))
        for row, column in zip(rows, columns, strict=True)
    )
    return list(found)[:count]


def _chosen(
    routers: Sequence[Any],
    modality: int,
    places: np.ndarray,
    tokens_BS: torch.Tensor,
    model: Transformer,
) -> np.ndarray | None:
    """Booleans [layers, experts, places] of the routers of a modality; None if it has none."""
    of_modality = (model.modality_of_id[tokens_BS] == modality).flatten()
    index = torch.from_numpy(places)
    layers = [
        record.selected_NE.cpu()[index].T.bool().numpy()
        for record in routers
        if record.kind == "experts" and bool(record.eligible_N[of_modality].any())
    ]
    # Groups may overlap; one that is of another size than the first is left out.
    alike = [layer for layer in layers if len(layer) == len(layers[0])]
    return np.stack(alike) if alike else None


def _text_pieces(
    mixed: MixedModel, tokens: np.ndarray, chosen_En: np.ndarray
) -> list[tuple[str, list[str]]]:
    colours = figures.EXPERT_COLOURS
    return [
        (
            mixed.tokenizer.decode([token], skip_special_tokens=False),
            [colours[expert % len(colours)] for expert in np.flatnonzero(chosen_En[:, place])],
        )
        for place, token in enumerate(tokens.tolist())
    ]
