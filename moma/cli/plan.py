"""`moma plan`: the cost of a recipe."""

from collections.abc import Mapping
from itertools import takewhile
from typing import Annotated, Any

from typer import Context, Option

from moma.cli.arguments import (
    COUNT_LIMIT,
    App,
    AsJson,
    Overrides,
    RecipeFile,
    load_recipe,
    refuse_unused,
)
from moma.cli.output import print_result
from moma.errors import UserError
from moma.study.tables import Table

app = App()
_COUNT = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "": 1}
_DECIMAL = {" T": 1e12, " G": 1e9, " M": 1e6, " k": 1e3, " ": 1}
_BYTES = {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10, " B": 1}
_SECONDS = {" days": 86_400, " h": 3600, " min": 60, " s": 1, " ms": 1e-3, " µs": 1e-6}


@app.command()
def plan(
    ctx: Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        Option(min=1, max=COUNT_LIMIT, help="plan memory, time, cost and communication on N GPUs"),
    ] = None,
    mfu: Annotated[float, Option(help="share of the peak that training reaches")] = 0.4,
    peak: Annotated[
        float | None, Option(help="peak of one GPU, TFLOP/s (default: an H100's data sheet)")
    ] = None,
    link: Annotated[float, Option(help="bandwidth of a GPU each way, GB/s")] = 50,
    memory: Annotated[float, Option(help="memory of one GPU, GiB")] = 80,
    price: Annotated[float, Option(help="price of one GPU-hour, in any currency")] = 2.5,
    as_json: AsJson = False,
) -> None:
    """Count a recipe's parameters and FLOPs. With --gpus, estimate memory, time and cost."""
    if gpus is None:
        refuse_unused(ctx, "without --gpus", "mfu", "peak", "link", "memory", "price")
    amounts = (1 if peak is None else peak, link, memory)
    if not (1e-6 <= mfu <= 1 and all(1e-6 <= value <= 1e12 for value in amounts)):
        raise UserError("--mfu must be 1e-6 to 1, and --peak, --link and --memory 1e-6 to 1e12")
    if not 0 <= price <= 1e12:
        raise UserError("--price must be 0 to 1e12")
    from moma.plan.counts import plan as count

    read = load_recipe(recipe, overrides)
    result = count(read)
    tables = [_counts(str(recipe), result)]
    if gpus is not None:
        from moma.plan.job import Machine, plan_job

        sizes = {"link": link * 1e9, "memory": memory * 2**30}
        if peak is not None:
            sizes["peak"] = peak * 1e12
        result |= plan_job(read, Machine(gpus=gpus, mfu=mfu, price=price, **sizes))
        tables += [_memory(result), _job(result)]
    print_result(result, as_json, tables)


def _counts(title: str, result: dict[str, Any]) -> Table:
    keys = ("parameters", "active_parameters", "flops_per_token")
    parts = [result["parts"][key] for key in keys]
    counts = {
        part: [each.get(part, 0) for each in parts]
        for part in dict.fromkeys([*parts[0], *parts[2]])
    }
    if result["layers"]["mod"]:
        for kind, number in result["layers"].items():
            of_kind = [sum(result["parts_by_layer"][key][kind].values()) for key in keys]
            counts[f"in {number} {kind} layers"] = of_kind
    counts["all"] = [result[key] for key in keys]
    rows = [
        (
            part,
            *(_scaled(count, _COUNT) if count else "" for count in (parameters, active)),
            _significant(flops / 1e9) if flops else "",
        )
        for part, (parameters, active, flops) in counts.items()
        if parameters or active or flops
    ]
    return Table(
        title, _caption(result), ("part", "parameters", "active", "GFLOPs per token"), rows
    )


def _caption(result: dict[str, Any]) -> str:
    layers = result["layers"]
    with_depth = f" and {layers['mod']} with mixture-of-depths" if layers["mod"] else ""
    parts = [
        f"{layers['full']} layers{with_depth}",
        f"{result['tokens_per_step']:,} tokens per step and rank",
    ]
    if result["auxiliary_parameters"]:
        parts.append(f"{_scaled(result['auxiliary_parameters'], _COUNT)} in auxiliary routers")
    if result["empty_slot_flops_per_token"]:
        parts.append(
            f"{_significant(result['empty_slot_flops_per_token'] / 1e9)} GFLOPs on empty slots"
        )
    return ", ".join(parts)


def _memory(result: dict[str, Any]) -> Table:
    memory, machine = result["memory"], result["machine"]
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    parts = takewhile(lambda key: key != "total", memory)
    rows = [(part.replace("_", " "), _scaled(memory[part], _BYTES)) for part in parts]
    return Table(
        f"memory of one of {machine['gpus']:,} GPUs",
        f"rank {memory['largest_rank']}, which needs most; {verdict} in "
        + _scaled(machine["memory"], _BYTES),
        ("part", "memory"),
        [*rows, ("all", _scaled(memory["total"], _BYTES))],
    )


def _job(result: dict[str, Any]) -> Table:
    time, sent, machine = result["time"], result["communication"], result["machine"]
    share = sent["part_of_step"]
    part = f"{_significant(100 * share)}% of its time"
    if share > 1:
        part = f"{_significant(share)} times as long as the step, so it limits the speed"
    tokens, of_step = (_scaled(time[key], _COUNT) for key in ("tokens", "tokens_per_step"))
    return Table(
        "time, cost and communication",
        f"at {_significant(100 * machine['mfu'])}% of {_scaled(machine['peak'], _DECIMAL)}FLOP/s, "
        f"{_scaled(machine['link'], _DECIMAL)}B/s, {machine['price']:g} per GPU-hour",
        (),
        [
            ("tokens", f"{tokens}, {of_step} per step"),
            ("FLOPs", f"{time['flops']:.3g}"),
            ("time per step", _scaled(time["step_seconds"], _SECONDS)),
            ("speed", f"{_scaled(time['tokens_per_second'], _COUNT)} tokens/s"),
            ("training", _scaled(86_400 * time["days"], _SECONDS)),
            ("GPU-hours", _significant(time["gpu_hours"])),
            ("cost", _significant(time["cost"])),
            ("weights gathered", f"{_scaled(sent['gathered'], _DECIMAL)}B per step and GPU"),
            ("gradients reduced", f"{_scaled(sent['reduced'], _DECIMAL)}B per step and GPU"),
            ("sending", f"{_scaled(sent['seconds'], _SECONDS)} per step, {part}"),
        ],
    )


def _scaled(value: float, units: Mapping[str, float]) -> str:
    """A value in the largest of some units, sorted by size, of which it is at least one."""
    unit = next((unit for unit, size in units.items() if value >= size), [*units][-1])
    return f"{_significant(value / units[unit])}{unit}"


def _significant(value: float) -> str:
    """Three significant digits, or all digits before the decimal point."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
