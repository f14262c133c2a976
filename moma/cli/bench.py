"""`moma bench …`: speed of the parts, measured on this machine."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Context, Option

from moma.cli.arguments import (
    COUNT_LIMIT,
    App,
    AsJson,
    CpuTime,
    files_and_overrides,
    load_recipe,
    refuse_unused,
)
from moma.cli.output import key_values, print_result, records
from moma.errors import UserError

app = App(help="Measure speed on this machine.", no_args_is_help=True)


def count(text: str, low: int = 1) -> Any:
    """An option that counts something."""
    return Option(min=low, max=COUNT_LIMIT, help=text)


Row = Literal["256", "90m", "435m", "1b4"]
Device = Annotated[Literal["cpu", "cuda"] | None, Option(help="[the GPU if there is one]")]
Dtype = Annotated[Literal["fp32", "bf16"], Option(help="type of weights and activations")]


def _require_gpu(device: str | None) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; leave it out, or use cpu")


@app.command()
def data(
    recipe: Annotated[
        Path | None, Argument(help="default: sketches of 1,024 codes and a dictionary")
    ] = None,
    overrides: Annotated[
        list[str] | None, Argument(help="changes to the recipe, such as data.micro_batch_size=4")
    ] = None,
    batches: Annotated[int, count("micro-batches of each repeat")] = 100,
    steps: Annotated[int, count("training steps")] = 2,
    images: Annotated[int, count("images of each repeat")] = 32,
    texts: Annotated[int, count("texts of each repeat")] = 30_000,
    repeats: Annotated[int, count("repeats of each measurement")] = 5,
    cpu_time: CpuTime = False,
    as_json: AsJson = False,
) -> None:
    """Measure micro-batches, waiting in training, and encoding of images and text."""
    if recipe is not None and "=" in str(recipe) and not os.path.exists(recipe):
        overrides, recipe = [str(recipe), *(overrides or ())], None
    from moma.bench.data import Sizes, bench_data
    from moma.recipe import shipped_recipe

    read = load_recipe(recipe or shipped_recipe("bench_data.toml"), overrides)
    sizes = Sizes(batches, steps, images, texts, repeats, cpu_time)
    result = bench_data(read, sizes, quiet=as_json)
    table = key_values(f"data of {recipe or 'the shipped recipe'}", result)
    print_result(result, as_json, [table])


@app.command()
def layer(
    dim: Annotated[
        list[int] | None, Option(min=32, max=2**20, help="width; may be repeated [256, 512]")
    ] = None,
    tokens: Annotated[int, count("a multiple of 32; half are image tokens", 32)] = 4096,
    repeats: Annotated[int, count("repeats of everything, interleaved")] = 31,
    dtype: Dtype = "fp32",
    device: Device = None,
    eager: Annotated[bool, Option("--eager", help="without torch.compile")] = False,
    cpu_time: CpuTime = False,
    as_json: AsJson = False,
) -> None:
    """Compare expert-choice layers with a dense feed-forward layer of equal FLOPs."""
    from moma.bench.layer import Sizes, bench_layer

    _require_gpu(device)
    if tokens % 32:
        raise UserError(f"--tokens {tokens}: must be a multiple of 32")
    sizes = Sizes(tuple(dim or (256, 512)), tokens, repeats, dtype, device, not eager, cpu_time)
    rows = bench_layer(sizes, quiet=as_json)
    print_result(rows, as_json, [records(f"feed-forward of {tokens:,} tokens", rows)])


@app.command()
def generate(
    overrides: Annotated[
        list[str] | None, Argument(help="changes to all models, such as codec.image_size=256")
    ] = None,
    row: Annotated[Row, Option(help="model size of Table 1, or 256")] = "90m",
    only: Annotated[
        list[str] | None,
        Option(help="architecture besides dense; may be repeated [moe_4t4i, mod_moe_4t4i]"),
    ] = None,
    batch: Annotated[
        list[int] | None,
        Option(min=1, max=COUNT_LIMIT, help="sequences at once; may be repeated [1, 8]"),
    ] = None,
    mode: Annotated[
        Literal["text", "image"] | None, Option(help="what to generate [both, in turn]")
    ] = None,
    tokens: Annotated[int, count("tokens of a text; an image has those of its codec")] = 64,
    drafts: Annotated[
        int, Option(min=0, max=1024, help="image codes to guess per pass, besides 0")
    ] = 0,
    repeats: Annotated[int, count("repeats of everything, interleaved")] = 3,
    dtype: Dtype = "fp32",
    device: Device = None,
    cpu_time: CpuTime = False,
    no_graphs: Annotated[bool, Option("--no-graphs", help="moma without CUDA graphs")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare generation with `transformers` and with the limit of memory bandwidth."""
    from moma.bench.generate import Sizes, bench_generate
    from moma.bench.throughput import table2

    _require_gpu(device)
    recipes = table2(row, overrides or (), only or ("moe_4t4i", "mod_moe_4t4i"))
    batches, modes = tuple(batch or Sizes.batches), (mode,) if mode else Sizes.modes
    sizes = Sizes(
        batches, modes, tokens, drafts, repeats, dtype, device, cpu_time, graphs=not no_graphs
    )
    rows = bench_generate(recipes, sizes, quiet=as_json)
    print_result(rows, as_json, [records(f"generation, row {row}", rows)])


@app.command()
def throughput(
    ctx: Context,
    recipes: Annotated[
        list[str] | None,
        Argument(help="recipes, the first is the baseline; and changes to all of them"),
    ] = None,
    table2: Annotated[bool, Option("--table2", help="instead: architectures of Table 2")] = False,
    row: Annotated[Row, Option(help="model size of --table2")] = "256",
    only: Annotated[
        list[str] | None, Option(help="architecture of --table2 besides dense; may be repeated")
    ] = None,
    repeats: Annotated[int, count("repeats of a step of each, interleaved")] = 11,
    warm_up: Annotated[int, count("steps of each before the measurement")] = 2,
    statistics: Annotated[
        bool, Option("--statistics", help="instead: the cost of the log's statistics")
    ] = False,
    cpu_time: CpuTime = False,
    as_json: AsJson = False,
) -> None:
    """Measure steps of `moma train` on synthetic documents: tokens per second, MFU, memory."""
    if not table2:
        refuse_unused(ctx, "without --table2", "row", "only")
    from moma.bench import throughput as bench

    paths, overrides = files_and_overrides(recipes or ())
    if table2 == bool(paths):
        raise UserError("name one or more recipes, or give --table2")
    if table2:
        chosen = bench.table2(row, overrides, only or bench.TABLE2)
    else:
        chosen = bench.named(paths, overrides)
    sizes = bench.Sizes(repeats, warm_up, cpu_time)
    if statistics:
        rows = bench.bench_statistics(chosen, sizes, quiet=as_json)
    else:
        baseline = "dense" if table2 else "first"
        rows = bench.bench_throughput(chosen, sizes, baseline, quiet=as_json)
    print_result(rows, as_json, [records("a training step", [_readable(row) for row in rows])])


def _readable(row: Mapping[str, str | float]) -> dict[str, str]:
    formats = {
        "peak_bytes": lambda value: f"{value / 2**30:.2f} GiB",
        "flops_per_token": lambda value: f"{value / 1e6:,.1f}M",
        "parameters": lambda value: f"{value / 1e6:,.1f}M",
        "mfu": "{:.1%}".format,
        "spread": "{:.2%}".format,
        "overhead": "{:.2%}".format,
    }

    def default(value: float) -> str:
        return f"{value:,.0f}" if value > 100 else f"{value:.4f}"

    return {
        key: value if isinstance(value, str) else formats.get(key, default)(value)
        for key, value in row.items()
    }
