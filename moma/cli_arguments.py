"""Arguments that several verbs take, checked before a verb imports what takes seconds (torch)."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer


def readable_recipe(recipe: Path) -> Path:
    """Refuse what is no TOML file at once; what its keys mean is checked by the verb."""
    from moma.recipe import read_values

    read_values(recipe)
    return recipe


def _existing_run(run: Path) -> Path:
    from moma.runs import Run

    return Run(run).require().path


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"moma {version('moma')}")
        raise typer.Exit


RecipeFile = Annotated[
    Path,
    typer.Argument(help="a recipe, such as configs/demo.toml", callback=readable_recipe),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="changes to the recipe, such as pretrain.steps=100")
]
RunFolder = Annotated[
    Path, typer.Argument(help="a folder that `moma train` wrote", callback=_existing_run)
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]
Version = Annotated[
    bool,
    typer.Option("--version", help="print the version", callback=_tell_version, is_eager=True),
]
