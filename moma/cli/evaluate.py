"""`moma evaluate`: held-out losses of a run."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from moma.cli.arguments import App, AsJson, RunFolder
from moma.cli.output import key_values, print_result

app = App()


@app.command()
def evaluate(
    run: RunFolder,
    routing: Annotated[
        Literal["choice", "causal", "auxiliary", "threshold"],
        Option(help="as in training; as in generation; by auxiliary routers; by thresholds"),
    ] = "choice",
    data: Annotated[Path | None, Option(help="prepared data that has moved")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss and perplexity on the held-out documents, by modality."""
    from moma.evaluate.perplexity import evaluate as measure
    from moma.runs import Run
    from moma.train.restore import load_run, require_routing, require_training_data

    model, recipe = load_run(Run(run))
    require_routing(Run(run), model, routing)
    if data is not None:
        moved = recipe.data.model_copy(update={"path": data})
        recipe = recipe.model_copy(update={"data": moved})
    require_training_data(Run(run), recipe)
    result = measure(model, recipe, routing, quiet=as_json)
    print_result(result, as_json, [key_values(f"{run}, {routing} routing", result)])
