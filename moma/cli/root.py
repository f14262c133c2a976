"""The command line: `moma <verb>`. Bad input ends with one message and exit code 2."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moma.cli.arguments import AsJson, Overrides, RecipeFile, RunFolder, Verbs, Version
from moma.cli.bench import app as bench_app
from moma.cli.hub import exporting, importing
from moma.cli.plan import app as plan_app
from moma.cli.tokenizer import app as tokenizer_app
from moma.errors import LostRankError, SharedError, StoppedError, UserError, os_error_message

if TYPE_CHECKING:
    from moma.study.page import Table as Content

app = typer.Typer(
    name="moma",
    cls=Verbs,
    help="Pre-train, run and study mixed-modal language models with modality-aware sparsity.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")

data_app = typer.Typer(help="Look at prepared data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app)
app.add_typer(importing)
app.add_typer(exporting)
app.add_typer(plan_app)


@app.callback()
def root(version: Version = False) -> None:
    """What stands before a verb."""


def main() -> None:
    """Run a verb; a `UserError` becomes one line on standard error and its exit code."""
    # `datasets` would otherwise ask a server whenever it opens a file, also without a network.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    # Large pages for large tensors of a CPU, where the system lends them: gradients of experts are
    # made anew in every step, page by page (docs/results/layer.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except UserError as error:
        _report(error, by_all=isinstance(error, SharedError))
        sys.exit(error.CODE)
    except LostRankError as error:
        _report(error)
        sys.exit(1)
    except StoppedError as stop:
        _report(stop, by_all=True)
        sys.exit(stop.CODE)
    except OSError as error:
        told = os_error_message(error)
        if told is None:
            raise
        _report(told)
        sys.exit(told.CODE)
    except SystemExit as leave:
        if leave.code == 130:  # Typer's answer to Ctrl-C
            print("moma: interrupted; the same command goes on from what is saved", file=sys.stderr)
        raise


def _report(error: Exception, by_all: bool = False) -> None:
    """Print a message; of one that all ranks of a job have, the first rank alone."""
    rank = int(os.environ.get("RANK", 0))
    if not rank:
        print(f"moma: {error}", file=sys.stderr)
    elif not by_all:
        print(f"moma, rank {rank}: {error}", file=sys.stderr)


@app.command()
def prepare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="processes that read images; changes no output")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Turn documents into encoded shards: train or load tokenizer and codec, then encode."""
    from moma.data.encode.prepare import prepare as run
    from moma.recipe import read_recipe
    from moma.runtime.world import local_device
    from moma.train.recipe import Recipe

    read = read_recipe(Recipe, recipe, overrides or ())
    prepared = run(read, local_device(), quiet=as_json, workers=workers)
    summary = {"path": str(read.data.path), **prepared.summary()}
    if as_json:
        print(json.dumps(summary))
        return
    for counts in (summary, *summary["sources"].values()):
        counts["held_out"] = counts["held_out"]["documents"]
    _show_counts(summary, ("documents", "held_out", "tokens", "images", "rejected"))
    print(f"prepared {read.data.path}")
    if summary["rejected"]:
        print(f"rejected rows: {read.data.path}/rejected.jsonl")


@data_app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="a folder that `moma prepare` wrote")],
    source: Annotated[str | None, typer.Option(help="only this source")] = None,
    document: Annotated[
        int | None, typer.Option(min=0, help="decode this document of the source, from 0")
    ] = None,
    split: Annotated[str, typer.Option(help="of the document: train or held_out")] = "train",
    out: Annotated[
        Path | None, typer.Option(help="folder for images; FOLDER/inspect if left out")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a prepared folder holds: counts, lengths, and any document as text and images."""
    from moma.data import inspect as data

    if document is not None:
        decoded = data.decode_document(folder, source, split, document, out or folder / "inspect")
        print(json.dumps(decoded) if as_json else data.as_text(decoded))
        return
    result = data.inspect(folder, source, out or folder / "inspect")
    if as_json:
        print(json.dumps(result))
        return
    keys = ("documents", "tokens", "text_tokens", "image_tokens", "images", "rejected")
    _show_counts(result, keys)
    print(data.histogram(result))
    print(result["figure"])


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Run the stage that the recipe names, or its chain; go on where it was interrupted."""
    from moma.evaluate.perplexity import evaluate
    from moma.runtime.world import join_world
    from moma.train.chain import Evaluation, next_command, read_chain, run_chain

    steps = read_chain(recipe, overrides or ())
    timeout = max(step.engine.timeout for step in steps if not isinstance(step, Evaluation))
    with join_world(timeout) as world:
        folder = run_chain(steps, world, evaluate)
        if world.rank == 0:
            print(f"trained {folder}")
            print(f"next: {next_command(steps[-1])}")


@app.command()
def replay(run: RunFolder, as_json: AsJson = False) -> None:
    """Go through the steps that led to a run's fault once more, and look into the last."""
    from moma.runs import Run
    from moma.train.replay import replay as go_through

    _show(f"{run}, its fault", go_through(Run(run), quiet=as_json), as_json)


@app.command()
def evaluate(
    run: RunFolder,
    routing: Annotated[
        str, typer.Option(help="choice: as in training; causal: by the auxiliary routers")
    ] = "choice",
    data: Annotated[
        Path | None, typer.Option(help="the prepared data, if it lies elsewhere than in training")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Loss and perplexity on the held-out documents, by modality."""
    if routing not in ("choice", "causal"):
        raise UserError(f"--routing {routing}: use choice or causal")
    from moma.evaluate.perplexity import evaluate as measure
    from moma.runs import Run
    from moma.train.restore import load_run, require_causal_routing

    model, recipe = load_run(Run(run))
    if routing == "causal":
        require_causal_routing(Run(run), model)
    if data is not None:
        moved = recipe.data.model_copy(update={"path": data})
        recipe = recipe.model_copy(update={"data": moved})
    result = measure(model, recipe, routing, quiet=as_json)  # type: ignore[arg-type]
    _show(f"{run}, {routing} routing", result, as_json)


@app.command()
def generate(
    run: RunFolder,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "",
    image: Annotated[Path | None, typer.Option(help="an image that precedes the text")] = None,
    mode: Annotated[str, typer.Option(help="what to write: text, image or mixed")] = "mixed",
    out: Annotated[Path, typer.Option(help="folder for images")] = Path("."),
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.7,
    top_p: Annotated[float, typer.Option(help="draw among the likeliest")] = 0.9,
) -> None:
    """Continue a prompt: text to standard output, images to PNG files."""
    if mode not in ("text", "image", "mixed"):
        raise UserError(f"--mode {mode}: use text, image or mixed")
    if not prompt and image is None:
        raise UserError("nothing to continue: give --prompt, --image or both")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError("--temperature must be at least 0, and --top-p above 0 and at most 1")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is no folder; name another")
    import moma
    from moma.generate.decode import Sampling
    from moma.images import read_image

    content: list[Any] = [] if image is None else [read_image(image, "--image", "choose another")]
    content += [prompt] if prompt else []
    model = moma.load(run)
    (answer,) = model.generate([content], mode, Sampling(temperature, top_p, seed))  # type: ignore[arg-type]
    if not answer:
        print("moma: the model ended the document at once", file=sys.stderr)
    images = 0
    for part in answer:
        if isinstance(part, str):
            print(part)
        else:
            images += 1
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"image_{images}.png"
            part.save(path)
            print(path)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders; the first is the baseline")],
    out: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Compare runs in one self-contained HTML page."""
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it, such as {out}/report.html")
    from moma.runs import Run
    from moma.study.compare import compare, comparison_tables

    result = compare([Run(path) for path in runs], out, quiet=as_json)
    _show_tables(result, comparison_tables(result), out, as_json)


@app.command()
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder for everything it makes")] = Path("runs/demo"),
    as_json: AsJson = False,
) -> None:
    """The whole way on real images: data, training, routers, evaluation, generation, report."""
    from moma.demo.run import demo_tables, run_demo

    result = run_demo(out, overrides or (), quiet=as_json)
    _show_tables(result, demo_tables(result), out / "report.html", as_json)


def _show_counts(summary: dict[str, Any], keys: tuple[str, ...]) -> None:
    """A table of a data folder: a row a source, and one for all."""
    table = Table("source", *[key.replace("_", " ") for key in keys], title=summary["path"])
    for name, counts in [*summary["sources"].items(), ("all", summary)]:
        table.add_row(name, *[f"{counts[key]:,}" for key in keys])
    Console().print(table)


def _show_tables(
    result: dict[str, Any], tables: "Sequence[Content]", report: Path, as_json: bool
) -> None:
    """What a report holds in figures, and where it is."""
    if as_json:
        print(json.dumps(result))
        return
    from moma.study.page import number

    console = Console()
    for content in tables:
        table = Table(*content.head, title=content.title, caption=content.explanation)
        for row in content.rows:
            table.add_row(*map(number, row))
        console.print(table)
    print(f"report: {report}")


def _show(title: str, result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    from moma.study.page import number

    table = Table(title=title, show_header=False)
    for key, value in _flat(result):
        table.add_row(key, number(value))
    Console().print(table)


def _flat(result: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in result.items():
        rows += (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
        )
    return rows


if __name__ == "__main__":
    main()
