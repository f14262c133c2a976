"""`moma plan`: what a recipe will cost, as tables for people or as one JSON object."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moma.cli.arguments import AsJson, Overrides, RecipeFile
from moma.errors import UserError

app = typer.Typer()


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="plan memory, time, cost and communication on so many")
    ] = None,
    mfu: Annotated[float, typer.Option(help="part of the peak that training uses")] = 0.4,
    peak: Annotated[float, typer.Option(help="of one GPU, TFLOP/s")] = 989,
    link: Annotated[float, typer.Option(help="that a GPU sends and receives, GB/s")] = 50,
    memory: Annotated[float, typer.Option(help="of one GPU, GiB")] = 80,
    price: Annotated[float, typer.Option(help="of one GPU for an hour, in any currency")] = 2.5,
    as_json: AsJson = False,
) -> None:
    """Count a recipe's parameters and operations by part; nothing is allocated."""
    from moma.plan.counts import plan as count
    from moma.recipe import read_recipe
    from moma.train.recipe import Recipe

    read = read_recipe(Recipe, recipe, overrides or ())
    result = count(read)
    if gpus is not None:
        from moma.plan.job import Machine, plan_job

        if not (0 < mfu <= 1 and peak > 0 and link > 0 and memory > 0 and price >= 0):
            raise UserError(
                "--mfu must be above 0 and at most 1, --peak, --link and --memory above 0, "
                "--price at least 0"
            )
        machine = Machine(
            gpus=gpus,
            mfu=mfu,
            peak=peak * 1e12,
            link=link * 1e9,
            memory=memory * 2**30,
            price=price,
        )
        result |= plan_job(read, machine)
    if as_json:
        print(json.dumps(result))
        return
    console = Console()
    console.print(_counts(str(recipe), result))
    if gpus is not None:
        console.print(_memory(result), _job(result))


def _counts(title: str, result: dict[str, Any]) -> Table:
    table = Table(
        "part", "parameters", "active", "GFLOPs a token", title=title, caption=_caption(result)
    )
    for column in table.columns[1:]:
        column.justify = "right"
    keys = ("parameters", "active_parameters", "flops_per_token")

    def add(name: str, counts: list[int], style: str | None = None) -> None:
        numbers = [*map(_short, counts[:2]), f"{counts[2] / 1e9:.3f}"]
        told = [number if count else "" for number, count in zip(numbers, counts, strict=True)]
        if any(counts):
            table.add_row(name, *told, style=style)

    parts = [result["parts"][key] for key in keys]
    for part in dict.fromkeys([*parts[0], *parts[2]]):
        add(part, [each.get(part, 0) for each in parts])
    if result["layers"]["gated"]:
        for kind, count in result["layers"].items():
            of_kind = [sum(result["parts_by_layer"][key][kind].values()) for key in keys]
            add(f"in {count} {kind} layers", of_kind, "dim")
    add("all", [result[key] for key in keys], "bold")
    return table


def _caption(result: dict[str, Any]) -> str:
    layers = result["layers"]
    told = [
        f"{layers['full']} layers" + (f" and {layers['gated']} gated" if layers["gated"] else ""),
        f"{result['tokens_per_step']:,} tokens a step and rank",
    ]
    if result["auxiliary_parameters"]:
        told.append(f"{_short(result['auxiliary_parameters'])} in auxiliary routers")
    if result["empty_slot_flops_per_token"]:
        told.append(f"{result['empty_slot_flops_per_token'] / 1e9:.3f} GFLOPs on empty slots")
    return ", ".join(told)


def _memory(result: dict[str, Any]) -> Table:
    found, machine = result["memory"], result["machine"]
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    table = Table(
        "part",
        "GiB",
        title=f"memory of one of {machine['gpus']:,} GPUs",
        caption=f"rank {found['largest_rank']}, which holds most; {verdict} in "
        f"{machine['memory'] / 2**30:,.0f} GiB",
    )
    table.columns[1].justify = "right"
    for part in ("parameters", "gradients", "optimizer", "gathered_units", "activations"):
        table.add_row(part.replace("_", " "), f"{found[part] / 2**30:,.2f}")
    table.add_row("all", f"{found['total'] / 2**30:,.2f}", style="bold")
    return table


def _job(result: dict[str, Any]) -> Table:
    time, sent, machine = result["time"], result["communication"], result["machine"]
    table = Table(
        title="time, cost and communication",
        show_header=False,
        caption=f"at {machine['mfu']:.0%} of {machine['peak'] / 1e12:,.0f} TFLOP/s, "
        f"{machine['link'] / 1e9:,.0f} GB/s, {machine['price']:g} a GPU-hour",
    )
    table.add_row("tokens", f"{_short(time['tokens'])}, {_short(time['tokens_per_step'])} a step")
    table.add_row("operations", f"{time['flops']:.3g}")
    table.add_row("a step", f"{time['step_seconds']:,.2f} s")
    table.add_row("speed", f"{time['tokens_per_second']:,.0f} tokens/s")
    table.add_row("training", f"{time['days']:,.1f} days, {time['gpu_hours']:,.0f} GPU-hours")
    table.add_row("cost", f"{time['cost']:,.0f}")
    table.add_row("weights gathered", f"{sent['gathered'] / 1e9:,.2f} GB a step and GPU")
    table.add_row("gradients added up", f"{sent['reduced'] / 1e9:,.2f} GB a step and GPU")
    table.add_row(
        "sending", f"{sent['seconds']:,.2f} s a step, {sent['part_of_step']:.0%} of its time"
    )
    return table


def _short(count: float) -> str:
    """1,234,567 as 1.23M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return (
                f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
            )
    return f"{count:.0f}"
