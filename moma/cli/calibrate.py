"""`moma calibrate`: thresholds by which a run is used causally."""

from typing import Annotated

from typer import Option

from moma.cli.arguments import App, RunFolder

app = App()


@app.command()
def calibrate(
    run: RunFolder,
    steps: Annotated[int, Option(min=1, help="number of training micro-batches")] = 100,
) -> None:
    """Compute routing thresholds from data, without training."""
    from moma.runs import Run
    from moma.train.calibrate import calibrate as compute

    print(compute(Run(run), steps))
