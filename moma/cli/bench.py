"""`moma bench …`: how fast the parts are, measured on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moma.errors import UserError

app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed on this machine."""


@app.command()
def data(
    recipe: Annotated[
        Path | None, typer.Argument(help="left out: sketches of 1,024 codes and a dictionary")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="changes to the recipe, such as data.micro_batch_size=4"),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="micro-batches of each repeat")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 8,
    images: Annotated[int, typer.Option(min=1, help="images of each repeat")] = 384,
    texts: Annotated[int, typer.Option(min=1, help="texts of each repeat")] = 50_000,
    repeats: Annotated[int, typer.Option(min=1, help="of each measurement")] = 7,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="of encoding: leave out what other processes take")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON object and nothing else")
    ] = False,
) -> None:
    """Micro-batches, waiting in training, encoding of images and text."""
    from moma.bench.data import Sizes, bench_data
    from moma.recipe import read_recipe, shipped_recipe
    from moma.train.recipe import Recipe

    read = read_recipe(Recipe, recipe or shipped_recipe("bench_data.toml"), overrides or ())
    sizes = Sizes(batches, steps, images, texts, repeats, cpu_time)
    result = bench_data(read, sizes, quiet=as_json)
    if as_json:
        print(json.dumps(result))
        return
    table = Table(title=f"data of {recipe or 'the shipped recipe'}", show_header=False)
    for key, value in result.items():
        table.add_row(key, f"{value:,.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


@app.command()
def layer(
    dim: Annotated[
        list[int] | None, typer.Option(min=32, help="width; may be given several times [256, 512]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=32, help="a multiple of 32, half of images")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="of everything, in turn")] = 31,
    dtype: Annotated[str, typer.Option(help="of weights and tokens: fp32 or bf16")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda [the GPU if there is one]")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="without torch.compile")] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="leave out what other processes take; for one thread")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON list and nothing else")
    ] = False,
) -> None:
    """Experts that choose their tokens, beside a feed-forward that need not."""
    import torch

    from moma.bench.layer import DTYPES, Sizes, bench_layer

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: use {' or '.join(DTYPES)}")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: use cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; leave it out, or use cpu")
    if tokens % 32:
        raise UserError(f"--tokens {tokens}: must be a multiple of 32")
    widths = tuple(dim or (256, 512))
    sizes = Sizes(widths, tokens, repeats, dtype, device, not eager, cpu_time)
    rows = bench_layer(sizes, quiet=as_json)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*rows[0], title=f"feed-forward of {tokens:,} tokens")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


@app.command()
def throughput(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(help="recipes, the first being the baseline; and changes to all of them"),
    ] = None,
    table2: Annotated[
        bool, typer.Option("--table2", help="instead: the architectures of Table 2")
    ] = False,
    row: Annotated[str, typer.Option(help="of --table2: 256, 90m, 435m or 1b4")] = "256",
    only: Annotated[
        list[str] | None, typer.Option(help="of --table2, beside dense; may be given several times")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="of a step of each, in turn")] = 11,
    warm_up: Annotated[int, typer.Option(min=1, help="steps of each before")] = 2,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="measure what the log's statistics cost instead")
    ] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="leave out what other processes take; for one thread")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print one JSON list and nothing else")
    ] = False,
) -> None:
    """Steps of `moma train` on made-up documents: tokens a second, MFU, memory."""
    from moma.bench import throughput as bench

    overrides = [text for text in recipes or () if "=" in text]
    paths = [Path(text) for text in recipes or () if "=" not in text]
    if table2 == bool(paths):
        raise UserError("name one or more recipes, or give --table2")
    chosen = (
        bench.table2(row, overrides, only or bench.TABLE2)
        if table2
        else bench.named(paths, overrides)
    )
    sizes = bench.Sizes(repeats, warm_up, cpu_time)
    if statistics:
        rows = bench.bench_statistics(chosen, sizes, quiet=as_json)
    else:
        baseline = "dense" if table2 else "first"
        rows = bench.bench_throughput(chosen, sizes, baseline, quiet=as_json)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*rows[0], title="a step of the trainer")
    for found in rows:
        table.add_row(*(_readable(key, value) for key, value in found.items()))
    Console().print(table)


def _readable(key: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    if key == "peak_bytes":
        return f"{value / 2**30:.2f} GiB"
    if key in ("flops_per_token", "parameters"):
        return f"{value / 1e6:,.1f}M"
    if key in ("mfu", "spread", "overhead"):
        return f"{value:.1%}" if key == "mfu" else f"{value:.2%}"
    return f"{value:,.0f}" if value > 100 else f"{value:.4f}"
