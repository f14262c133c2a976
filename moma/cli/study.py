"""`moma report`: runs side by side."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moma.cli.arguments import App, AsJson
from moma.cli.output import print_result

app = App()


@app.command()
def report(
    runs: Annotated[list[Path], Argument(help="run folders; the first is the baseline")],
    out: Annotated[Path, Option(help="the HTML file to write")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Compare runs in one self-contained HTML page."""
    from moma.runs import Run
    from moma.study.compare import compare, comparison_tables

    result = compare([Run(path).require() for path in runs], out, quiet=as_json)
    lines = [f"report: {out}"]
    print_result(result, as_json, comparison_tables(result), lines)
