"""`moma prepare` and `moma data inspect`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Context, Option

from moma.cli.arguments import App, AsJson, Overrides, RecipeFile, load_recipe, refuse_unused
from moma.cli.output import print_result
from moma.errors import UserError
from moma.study.tables import Table

if TYPE_CHECKING:
    from moma.train.recipe import Recipe

app = App()
inspecting = App(name="data", help="Look at prepared data.", no_args_is_help=True)
app.add_typer(inspecting)


@app.command()
def prepare(
    ctx: Context,
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, Option(min=1, max=1024, help="the output does not depend on them [cores]")
    ] = None,
    verify: Annotated[
        bool, Option("--verify", help="read all shards, and make damaged ones again")
    ] = False,
    ray: Annotated[
        str | None,
        Option(help="encode on the Ray cluster at this address; auto: this machine's cluster"),
    ] = None,
    share: Annotated[
        str | None,
        Option(help="encode only share I of N of the parts, such as 3/16; needs data.remote"),
    ] = None,
    plan: Annotated[
        bool, Option("--plan", help="only estimate parts, tokens, hours and cost")
    ] = False,
    price: Annotated[
        float | None, Option(min=0, help="of an hour of all processes, for --plan")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Encode documents into shards. First train or load the tokenizer and the image codec."""
    from moma.data.encode.prepare import prepare as run
    from moma.data.encode.shares import Share
    from moma.runtime.world import local_device

    own = None if share is None else Share.parse(share)
    if own is not None:
        refuse_unused(ctx, "with --share", "ray", "verify", "plan")
    read = load_recipe(recipe, overrides)
    if plan:
        refuse_unused(ctx, "with --plan", "ray", "verify")
        _print_plan(read, local_device(), processes, price, as_json)
        return
    refuse_unused(ctx, "without --plan", "price")
    prepared = run(read, local_device(), as_json, processes, verify, ray, own)
    summary = {"path": str(read.data.path), **prepared.summary()}
    lines = [f"prepared {read.data.path}"]
    if own is not None and prepared.missing:
        lines = [own.describe_missing([*prepared.sources], prepared.missing)]
    if summary["rejected"]:
        lines.append(
            f"rejected documents: {read.data.path / 'rejected.jsonl'}; of a source's documents "
            f"data.max_rejected = {read.data.max_rejected:g} may be"
        )
    lines += _dropped(summary)
    keys = ("documents", "held_out", "tokens", "images", "rejected")
    print_result(summary, as_json, [_counts(summary, keys)], lines)


def _print_plan(
    recipe: "Recipe", device: Any, processes: int | None, price: float | None, as_json: bool
) -> None:
    from moma.data.encode.estimate import estimate
    from moma.data.encode.executors import spare_cores
    from moma.data.encode.prepare import read_from_the_beginning

    plan = estimate(recipe, device, processes or spare_cores() + 1, price)
    formats = {"bytes": "{:,.0f}", "hours": "{:,.2f}", "cost": "{:,.2f}"}
    keys = ("parts", "bytes", "documents", "tokens", "images", "hours", "cost")
    rows = [
        (
            name,
            *(
                "unknown" if counts[key] is None else formats.get(key, "{:,}").format(counts[key])
                for key in keys
            ),
        )
        for name, counts in [*plan["sources"].items(), ("all", plan)]
    ]
    lines = [f"estimated from samples, for {plan['processes']} processes; nothing was written"]
    if plan["uncut"]:
        lines.append(read_from_the_beginning(plan["uncut"]))
    print_result(plan, as_json, [Table(plan["path"], "", ("source", *keys), rows)], lines)


@inspecting.command()
def inspect(
    ctx: Context,
    folder: Annotated[str, Argument(help="a folder that `moma prepare` wrote, or its data.remote")],
    source: Annotated[str | None, Option(help="only this source")] = None,
    document: Annotated[
        int | None, Option(min=1, max=2**62, help="decode this document of the source, from 1 on")
    ] = None,
    split: Annotated[
        Literal["train", "held_out"], Option(help="documents that --document counts")
    ] = "train",
    out: Annotated[
        Path | None, Option(help="folder for images [FOLDER/inspect, or inspect]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show counts and lengths of prepared data, or one document as text and images."""
    if document is None:
        refuse_unused(ctx, "without --document", "split")
    from moma.data import inspect as data

    with _data_folder(folder, source, decodes=document is not None) as (path, default_out):
        out = out or default_out
        if document is not None:
            decoded = data.decode_document(path, source, split, document, out)
            print_result(decoded, as_json, (), [data.document_as_text(decoded)])
            return
        result = data.inspect(path, source, out) | {"path": folder}
    keys = ("documents", "tokens", "text_tokens", "image_tokens", "images", "rejected")
    lines = (*_dropped(result), data.lengths_as_text(result), result["figure"])
    print_result(result, as_json, [_counts(result, keys)], lines)


@contextmanager
def _data_folder(where: str, source: str | None, decodes: bool) -> Iterator[tuple[Path, Path]]:
    """A data folder, or a temporary one with what is at an address; and where images are put."""
    from moma.data.encode.existing import fetch_existing
    from moma.data.remote.address import check_address
    from moma.recipe_paths import parse_path

    path, address = None, ""
    try:
        if "://" in where:
            address = check_address(where)
        else:
            path = parse_path(where)
    except ValueError as error:
        raise UserError(f"FOLDER: {error}") from error
    if path is not None:
        yield path, path / "inspect"
        return
    with TemporaryDirectory() as temporary:
        fetch_existing(address, Path(temporary), source, decodes)
        yield Path(temporary), Path("inspect")


def _dropped(summary: dict[str, Any]) -> list[str]:
    """What `clean` drops, a line for each key of each source."""
    return [
        f"{name}: clean.{key} dropped {count:,} {kind}"
        for name, counts in summary["sources"].items()
        for kind, found in (("documents", "dropped"), ("images", "dropped_images"))
        for key, count in counts[found].items()
    ]


def _counts(summary: dict[str, Any], keys: tuple[str, ...]) -> Table:
    """Counts of a data folder: a row for each source, and one for all."""

    def cell(counts: dict[str, Any], key: str) -> str:
        value = counts[key]
        return f"{value['documents'] if isinstance(value, dict) else value:,}"

    rows = [
        (name, *(cell(counts, key) for key in keys))
        for name, counts in [*summary["sources"].items(), ("all", summary)]
    ]
    head = ("source", *(key.replace("_", " ") for key in keys))
    return Table(summary["path"], "", head, rows)
