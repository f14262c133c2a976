"""`moma plan`: the cost of a recipe."""

from typing import Annotated, Any

from typer import Option

from moma.cli.arguments import COUNT_LIMIT, App, AsJson, Overrides, RecipeFile, load_recipe
from moma.cli.output import print_result
from moma.errors import UserError
from moma.study.tables import Table

app = App()


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        Option(min=1, max=COUNT_LIMIT, help="plan memory, time, cost and communication on N GPUs"),
    ] = None,
    mfu: Annotated[float, Option(help="share of the peak that training reaches")] = 0.4,
    peak: Annotated[float, Option(help="peak of one GPU, TFLOP/s")] = 989,
    link: Annotated[float, Option(help="bandwidth of a GPU each way, GB/s")] = 50,
    memory: Annotated[float, Option(help="memory of one GPU, GiB")] = 80,
    price: Annotated[float, Option(help="price of a GPU-hour, in any currency")] = 2.5,
    as_json: AsJson = False,
) -> None:
    """Count a recipe's parameters and FLOPs by part; nothing is allocated."""
    amounts = (peak, link, memory)
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

        sizes = {"peak": peak * 1e12, "link": link * 1e9, "memory": memory * 2**30}
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
    if result["layers"]["gated"]:
        for kind, number in result["layers"].items():
            of_kind = [sum(result["parts_by_layer"][key][kind].values()) for key in keys]
            counts[f"in {number} {kind} layers"] = of_kind
    counts["all"] = [result[key] for key in keys]
    rows = [
        (
            part,
            *(_short(count) if count else "" for count in (parameters, active)),
            f"{flops / 1e9:.3f}" if flops else "",
        )
        for part, (parameters, active, flops) in counts.items()
        if parameters or active or flops
    ]
    return Table(title, _caption(result), ("part", "parameters", "active", "GFLOPs a token"), rows)


def _caption(result: dict[str, Any]) -> str:
    layers = result["layers"]
    parts = [
        f"{layers['full']} layers" + (f" and {layers['gated']} gated" if layers["gated"] else ""),
        f"{result['tokens_per_step']:,} tokens a step and rank",
    ]
    if result["auxiliary_parameters"]:
        parts.append(f"{_short(result['auxiliary_parameters'])} in auxiliary routers")
    if result["empty_slot_flops_per_token"]:
        parts.append(f"{result['empty_slot_flops_per_token'] / 1e9:.3f} GFLOPs on empty slots")
    return ", ".join(parts)


def _memory(result: dict[str, Any]) -> Table:
    memory, machine = result["memory"], result["machine"]
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    parts = ("parameters", "gradients", "optimizer", "gathered_units", "activations")
    rows = [(part.replace("_", " "), f"{memory[part] / 2**30:,.2f}") for part in parts]
    return Table(
        f"memory of one of {machine['gpus']:,} GPUs",
        f"rank {memory['largest_rank']}, which needs most; {verdict} in "
        f"{machine['memory'] / 2**30:,.0f} GiB",
        ("part", "GiB"),
        [*rows, ("all", f"{memory['total'] / 2**30:,.2f}")],
    )


def _job(result: dict[str, Any]) -> Table:
    time, sent, machine = result["time"], result["communication"], result["machine"]
    return Table(
        "time, cost and communication",
        f"at {machine['mfu']:.0%} of {machine['peak'] / 1e12:,.0f} TFLOP/s, "
        f"{machine['link'] / 1e9:,.0f} GB/s, {machine['price']:g} a GPU-hour",
        (),
        [
            ("tokens", f"{_short(time['tokens'])}, {_short(time['tokens_per_step'])} a step"),
            ("FLOPs", f"{time['flops']:.3g}"),
            ("a step", f"{time['step_seconds']:,.2f} s"),
            ("speed", f"{time['tokens_per_second']:,.0f} tokens/s"),
            ("training", f"{time['days']:,.1f} days, {time['gpu_hours']:,.0f} GPU-hours"),
            ("cost", f"{time['cost']:,.0f}"),
            ("weights gathered", f"{sent['gathered'] / 1e9:,.2f} GB a step and GPU"),
            ("gradients reduced", f"{sent['reduced'] / 1e9:,.2f} GB a step and GPU"),
            ("sending", f"{sent['seconds']:,.2f} s a step, {sent['part_of_step']:.0%} of its time"),
        ],
    )


def _short(count: float) -> str:
    """1,234,567 as 1.23M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:{'.3g' if count < 999.5 * size else '.0f'}}{unit}"
    return f"{count:.0f}"
