"""Weights of other libraries: `moma import <format>` and `moma export <format>`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from moma.cli.arguments import App, load_recipe
from moma.cli.output import notice

importing = App(
    name="import", help="Make a run from another library's weights.", no_args_is_help=True
)
exporting = App(
    name="export", help="Write a run's weights for another library.", no_args_is_help=True
)


@importing.command("chameleon")
def import_chameleon(
    folder: Annotated[Path, Argument(help="what `transformers` saved: config.json, weights")],
    out: Annotated[Path, Option(help="the run folder to make")],
    tokenizers: Annotated[
        Path | None, Option(help="tokenizers or a run to use instead of the folder's own")
    ] = None,
    recipe: Annotated[
        Path | None, Option(help="a recipe whose [data] the run is evaluated on")
    ] = None,
) -> None:
    """Make a dense run from the `transformers` port of Chameleon."""
    from moma.hub.chameleon import import_chameleon as run
    from moma.runs import Run, Tokenizers

    given = None if tokenizers is None else Tokenizers(tokenizers).require()
    base = None if recipe is None else load_recipe(recipe)
    for message in run(folder, Run(out), given, base):
        notice(message)
    print(f"imported {out}")


@exporting.command("chameleon")
def export_chameleon(
    run: Annotated[Path, Argument(help="the folder of a dense run")],
    out: Annotated[Path, Option(help="the folder to make")],
) -> None:
    """Write a dense run as the `transformers` port of Chameleon."""
    from moma.hub.chameleon import export_chameleon as export
    from moma.runs import Run

    for message in export(Run(run), out):
        notice(message)
    print(f"exported {out}")
