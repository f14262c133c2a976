"""`moma import` and `moma export`: models of moma and of other libraries, as folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Context, Option

from moma.cli.arguments import App, RunFolder, load_recipe, refuse_unused
from moma.cli.output import notice
from moma.errors import UserError, quote

app = App()
Format = Literal["moma", "chameleon"]


@app.command("import")
def import_(
    ctx: Context,
    folder: Annotated[Path, Argument(help="a folder with config.json and safetensors weights")],
    run: Annotated[Path, Argument(help="the run folder to make")],
    format_: Annotated[
        Format | None, Option("--format", help="by default what config.json says")
    ] = None,
    tokenizers: Annotated[
        Path | None,
        Option(help="with chameleon: tokenizers or a run to use instead of the folder's own"),
    ] = None,
    recipe: Annotated[
        Path | None, Option(help="a recipe whose [data] the run is evaluated on")
    ] = None,
) -> None:
    """Make a run from an exported folder, or from a Chameleon model."""
    from moma.runs import Run, Tokenizers

    format_ = format_ or _format_of(folder)
    base = None if recipe is None else load_recipe(recipe)
    if format_ == "moma":
        refuse_unused(ctx, "with --format moma", "tokenizers")
        from moma.hub.moma_format import import_moma

        notes = import_moma(folder, Run(run), base)
    else:
        from moma.hub.chameleon import import_chameleon

        given = None if tokenizers is None else Tokenizers(tokenizers).require()
        notes = import_chameleon(folder, Run(run), given, base)
    for note in notes:
        notice(note)
    print(f"imported {run}")


@app.command("export")
def export(
    ctx: Context,
    run: RunFolder,
    folder: Annotated[Path, Argument(help="the folder to make")],
    format_: Annotated[
        Format, Option("--format", help="whose: moma's, or of a dense run Chameleon's")
    ] = "moma",
    results: Annotated[
        list[Path] | None,
        Option(help="a file of JSON by `moma evaluate`, for the model card; may be repeated"),
    ] = None,
    push: Annotated[
        str | None,
        Option(help="also upload it to this repository of the Hugging Face Hub, as USER/NAME"),
    ] = None,
    public: Annotated[
        bool, Option("--public", help="with --push: a new repository is not private")
    ] = False,
) -> None:
    """Export a run, to publish it or as a Chameleon model."""
    if format_ == "chameleon":
        refuse_unused(ctx, "with --format chameleon", "results")
    if push is None:
        refuse_unused(ctx, "without --push", "public")
    else:
        from moma.hub.push import require_repository

        require_repository(push)
    for note in _export(run, folder, format_, push, results or ()):
        notice(note)
    print(f"exported {folder}", flush=True)
    if push is not None:
        from moma.hub.push import push_folder

        print(f"uploaded {push_folder(folder, push, public)}")


def _export(
    run: Path, folder: Path, format_: Format, repo: str | None, results: Sequence[Path]
) -> list[str]:
    from moma.runs import Run

    if format_ == "moma":
        from moma.hub.moma_format import export_moma

        return export_moma(Run(run), folder, repo=repo, results=results)
    from moma.hub.chameleon import export_chameleon

    return export_chameleon(Run(run), folder)


def _format_of(folder: Path) -> Format:
    from moma.hub.folder import CONFIG_FILE, read_config

    found = read_config(folder).get("model_type")
    if found not in ("moma", "chameleon"):
        raise UserError(
            f"{folder / CONFIG_FILE}: model_type is {quote(str(found))}; moma imports models of "
            "type moma and chameleon"
        )
    return "moma" if found == "moma" else "chameleon"
