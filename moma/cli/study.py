"""`moma study`: a grid of runs. `moma report`: runs side by side."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moma.cli.arguments import App, AsJson, Overrides, readable_recipe
from moma.cli.output import notice, print_result

app = App()


def _study_file(name: Path) -> Path:
    """A study of `configs/study/` by its name, or a file."""
    from moma.errors import UserError, list_names
    from moma.recipe import shipped_recipe

    # A folder may have the name of a study: the one that contains its data.
    if name.suffix or len(name.parts) > 1 or (name.exists() and not name.is_dir()):
        return readable_recipe(name)
    shipped = shipped_recipe("study/routing.toml").parent
    known = sorted(file.stem for file in shipped.glob("*.toml"))
    if name.name not in known:
        raise UserError(f"{name}: there is no such file or study; there are {list_names(known)}")
    return shipped / f"{name}.toml"


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
    ray: Annotated[
        str | None, Option(help="train on the Ray cluster at this address; auto: this machine's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train and measure variants with several seeds. Report means with intervals."""
    from moma.errors import UserError
    from moma.study.grid import read_study
    from moma.study.processes import run_study
    from moma.study.report import write_report
    from moma.study.results import study_tables, summarize

    read = read_study(file, overrides or ())
    failures = run_study(read, processes, ray, quiet=as_json)
    finished = read.finished()
    if finished.runs:
        result = summarize(finished)
        lines = [f"report: {write_report(finished, result)}"]
        print_result(result, as_json, study_tables(result), lines)
    if failures:
        name, message = next(iter(failures.items()))
        raise UserError(f"{len(failures)} of {len(read.runs)} runs failed; {name}: {message}")
    if running := len(read.runs) - len(finished.runs):
        notice(f"{running} of {len(read.runs)} runs are not finished; other processes run them")


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
