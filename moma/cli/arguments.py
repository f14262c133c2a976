"""Arguments that several verbs take, checked before a verb imports what takes seconds (torch)."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moma.errors import UserError


class Verbs(TyperGroup):
    """The verbs; a change to the recipe that is written as an option is told how to write it."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Of Click, or of the copy of it that later versions of Typer bring.
            if type(error).__name__ == "NoSuchOption":
                _refuse_dashes(error)
            raise


def _refuse_dashes(error: Any) -> None:
    has_section = "." in error.option_name
    given = [
        text
        for text in sys.argv
        if text.startswith(f"{error.option_name}=") or (has_section and text == error.option_name)
    ]
    takes_changes = any(parameter.name == "overrides" for parameter in error.ctx.command.params)
    similar = set(error.possibilities or ()) - {"--help"}
    if not given or not takes_changes or (similar and not has_section):
        return
    change = given[0].lstrip("-") + ("" if "=" in given[0] else "=…")
    section = "" if has_section else ", or with its section as in pretrain.steps=100"
    raise UserError(
        f"{given[0]}: there is no such option; write a change to the recipe without dashes: "
        f"{change}{section}"
    )


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
