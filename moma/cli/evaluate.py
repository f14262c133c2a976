"""`moma evaluate`: held-out losses of a run, and suites of measures."""

from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from moma.cli.arguments import App, AsJson, MovedData, RunFolder, with_data
from moma.cli.output import key_values, print_result
from moma.errors import UserError
from moma.study.tables import Table, markdown, number

app = App()
SuiteName = Literal[
    "perplexity",
    "captions",
    "retrieval",
    "visual_questions",
    "multiple_choice",
    "reconstruction",
    "clip_score",
    "fid",
]


Suite = Annotated[
    SuiteName | None,
    Option(help="what to measure; by default the loss on packed held-out documents"),
]
From = Annotated[
    Path | None,
    Option("--from", help="documents or questions of the suite; by default what is held out"),
]
RoutingChoice = Annotated[
    Literal["choice", "causal", "threshold", "auxiliary", "half"] | None,
    Option(
        help="choice: as in training; causal: as in generation, the default with --suite; half: "
        "depth routers by a score above one half  [default: choice]"
    ),
]
Weights = Annotated[
    str | None, Option(help="CLIP model of clip_score, or Inception weights of fid")
]
AsMarkdown = Annotated[
    bool, Option("--markdown", help="with --suite: print a Markdown table and nothing else")
]


@app.command()
def evaluate(
    run: RunFolder,
    suite: Suite = None,
    from_: From = None,
    routing: RoutingChoice = None,
    weights: Weights = None,
    data: MovedData = None,
    as_json: AsJson = False,
    as_markdown: AsMarkdown = False,
) -> None:
    """Measure the held-out loss of a run by modality, or run a suite."""
    if suite is None and (from_ is not None or as_markdown):
        given = "--markdown" if from_ is None else "--from"
        raise UserError(f"{given}: no effect without --suite; leave it out")
    if weights is not None and suite not in ("clip_score", "fid"):
        raise UserError("--weights: no effect without --suite clip_score or fid; leave it out")
    if suite in ("reconstruction", "clip_score", "fid") and routing not in (None, "causal"):
        raise UserError(f"--routing: no effect on {suite}; leave it out")
    if as_json and as_markdown:
        raise UserError("--json and --markdown: choose one")
    from moma.evaluate.perplexity import evaluate as measure
    from moma.evaluate.suite import run_suite
    from moma.generate.mixed import MixedModel
    from moma.runs import Run
    from moma.runtime.world import join_world
    from moma.train.restore import load_run, require_routing, require_training_data

    routing = routing or ("choice" if suite is None else "causal")
    model, recipe = load_run(Run(run))
    require_routing(Run(run), model, routing)
    recipe = with_data(recipe, data)
    if from_ is None:
        require_training_data(Run(run), recipe)
    quiet = as_json or as_markdown
    if suite is None:
        losses = measure(model, recipe, routing, quiet)
        print_result(losses, as_json, [key_values(f"{run}, {routing} routing", losses)])
        return
    mixed = MixedModel.assemble(model, Run(run).tokenizers, recipe.data.sequence_length)
    with join_world() as world:
        result = run_suite(suite, mixed, recipe.data, world, from_, routing, weights, quiet)
        if world.rank == 0:
            table = suite_table(f"{run}, {suite}, {routing} routing", result["sources"])
            if as_markdown:
                print(markdown(table))
            else:
                print_result(result, as_json, [table])


def suite_table(title: str, sources: dict[str, dict[str, Any]]) -> Table:
    """A row for each source: the measures, each with its interval."""
    head = ("source", *next(iter(sources.values())))
    rows = [
        (name, documents, *map(_with_interval, measures))
        for name, (documents, *measures) in ((name, row.values()) for name, row in sources.items())
    ]
    return Table(title, "With 95% intervals by a bootstrap over documents.", head, rows)


def _with_interval(measure: dict[str, float] | None) -> str:
    if measure is None or measure["low"] is None:
        return number(measure and measure["value"])
    return f"{number(measure['value'])} ({number(measure['low'])} – {number(measure['high'])})"
