"""`moma study`: a grid of runs. `moma report`: runs side by side."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moma.cli.arguments import App, AsJson, Overrides, readable_recipe
from moma.cli.output import print_result

app = App()


def _study_file(name: Path) -> Path:
    """A study of `configs/study/` by its name, or a file."""
    from moma.recipe import shipped_recipe

    if name.suffix or name.exists() or len(name.parts) > 1:
        return readable_recipe(name)
    return shipped_recipe(f"study/{name}.toml")


@app.command()
def study(
    file: Annotated[
        Path,
        Argument(help="a study: a file, or the name of one in configs/study", callback=_study_file),
    ],
    overrides: Overrides = None,
    processes: Annotated[
        int | None, Option(min=1, max=1024, help="processes [one per GPU, or per core]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train and measure a grid of recipes and seeds, and report means and intervals."""
    from moma.study.grid import read_study
    from moma.study.processes import run_study
    from moma.study.results import study_tables, summarize, write_report

    read = read_study(file, overrides or ())
    if not run_study(read, processes, quiet=as_json):
        counts = {"finished": len(read.results()), "runs": len(read.runs)}
        lines = [
            "{finished} of {runs} runs are finished; other processes run the rest".format(**counts)
        ]
        print_result(counts, as_json, (), lines)
        return
    result = summarize(read)
    lines = [f"report: {write_report(read, result)}"]
    print_result(result, as_json, study_tables(result), lines)


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
