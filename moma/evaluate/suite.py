"""Run a suite on one rank or many: each rank measures its share of the documents."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from moma.data.config import DataConfig
from moma.evaluate.images import clip_score, fid, reconstruction
from moma.evaluate.questions import multiple_choice, visual_questions
from moma.evaluate.score import score
from moma.evaluate.suites import Subject, Suite, captions, perplexity, retrieval
from moma.evaluate.summary import Record, summarize
from moma.generate.mixed import MixedModel
from moma.model.routing import RoutingName
from moma.progress import show_progress
from moma.runtime.world import World, gather, raise_on_all_ranks

SUITES: dict[str, Callable[[Subject], Suite]] = {
    "perplexity": perplexity,
    "captions": captions,
    "retrieval": retrieval,
    "visual_questions": visual_questions,
    "multiple_choice": multiple_choice,
    "reconstruction": reconstruction,
    "clip_score": clip_score,
    "fid": fid,
}
# Documents whose sequences are batched by length together, and held in memory.
_UNITS_AT_ONCE = 128


def run_suite(
    name: str,
    mixed: MixedModel,
    data: DataConfig,
    world: World,
    path: Path | None = None,
    routing: RoutingName = "causal",
    weights: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a model on a suite.

    Args:
        name: a key of `SUITES`.
        data: the prepared data of the run; a batch of scored sequences has as many tokens as a
            micro-batch.
        world: the ranks, each with the whole model; the result is the same on all.
        path: the suite's file or folder; None for the documents that the run holds out.
        routing: under `choice`, a score depends on the other sequences of its batch.
        weights: see `Subject`.

    Returns:
        `suite`, `routing`, and `sources`: see `summarize`.

    Raises:
        UserError: there are no documents, or one cannot be used.
    """
    max_tokens = data.micro_batch_size * data.sequence_length
    scorer = partial(score, mixed.model, max_tokens=max_tokens, routing=routing)
    records: dict[int, Record] = {}
    with raise_on_all_ranks(world):
        warns = world.rank == 0
        suite = SUITES[name](Subject(mixed, scorer, data, path, weights, warns))
        own = range(world.rank, len(suite.units), world.size)
        with show_progress(f"{name} ({routing})", len(own), quiet or world.rank > 0) as report:
            for start in range(0, len(own), _UNITS_AT_ONCE):
                part = own[start : start + _UNITS_AT_ONCE]
                found = suite.measure([suite.units[index] for index in part])
                records.update(zip(part, found, strict=True))
                report(start + len(part))
    for others in gather(records, world.writers):
        records.update(others)
    ordered = [records[index] for index in range(len(suite.units))]
    rows = summarize(ordered, suite.formulas)
    totals = suite.totals()
    for source, row in rows.items():
        row.update(totals if source == "all" else dict.fromkeys(totals))
    return {"suite": name, "routing": routing, "sources": rows}
