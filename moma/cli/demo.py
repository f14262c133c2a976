"""`moma demo`: everything once, on real images."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moma.cli.arguments import App, AsJson, Overrides
from moma.cli.output import print_result

app = App()


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, Option(help="folder for everything it writes")] = Path("runs/demo"),
    routers: Annotated[
        bool, Option("--routers", help="train auxiliary routers too, and compare their losses")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prepare images, train two models, and compare them in a report."""
    from moma.demo.run import demo_tables, run_demo

    result = run_demo(out, overrides or (), routers, quiet=as_json)
    lines = [f"report: {out / 'report.html'}"]
    print_result(result, as_json, demo_tables(result), lines)
