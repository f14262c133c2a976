"""Arguments that several verbs take, checked before a verb imports what takes seconds (torch)."""

import os
import select
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from typer import Argument, Option
from typer.core import TyperCommand, TyperGroup

from moma.errors import UserError, quote

if TYPE_CHECKING:
    from PIL.Image import Image

    from moma.train.recipe import Recipe

# Options with text for a model: it may be empty or contain any bytes.
_FREE_TEXT = {"prompt", "text"}
# Options with text of a model, which may consist of spaces and line breaks.
_MODEL_TEXT = {"stop"}
_ORDER = "moma.order"
COUNT_LIMIT = 1_000_000_000
"""Largest value of an option that counts something."""

CausalRouting = Annotated[
    Literal["causal", "threshold", "auxiliary", "half"],
    Option(
        help="causal: by thresholds, or without any by auxiliary routers; half: depth routers by a "
        "score above one half"
    ),
]


class ClosedOutputError(Exception):
    """The reader of standard output, such as `head`, has stopped."""


class Group(TyperGroup):
    """The root of all verbs."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:  # before Typer turns it into exit code 1
            if _is_output_closed():
                raise ClosedOutputError from error
            raise
        except Exception as error:
            # Of Click, or of the copy of it that later versions of Typer contain.
            if type(error).__name__ == "NoSuchOption":
                _explain_override_as_option(error)
            raise


class Verb(TyperCommand):
    """A verb whose raw values are checked before they are converted."""

    def make_parser(self, ctx: Any) -> Any:
        """The parser of the command line, followed by the checks."""
        parser: Any = super().make_parser(ctx)
        if ctx.resilient_parsing:  # to complete a word
            return parser
        parse = parser.parse_args
        types = get_type_hints(self.callback)

        def parse_and_check(args: list[str]) -> Any:
            values, rest, order = parse(args=args)
            options = [param for param in order if param.param_type_name == "option"]
            for param in dict.fromkeys(order):
                times = options.count(param)
                if times > 1 and not (param.multiple or param.is_flag):
                    raise UserError(f"{param.opts[0]}: given {times} times; give it once")
                if param.name not in _FREE_TEXT and param.name in values:
                    values[param.name] = _checked(param, values[param.name], types.get(param.name))
            ctx.meta[_ORDER] = [param.name for param in options]
            return values, rest, order

        parser.parse_args = parse_and_check
        return parser


class App(typer.Typer):
    """A family of verbs."""

    def __init__(self, **options: Any):
        # Without Rich's markup, which would take `[data]` in a help text for a style.
        options = {"rich_markup_mode": None, "add_completion": False} | options
        super().__init__(pretty_exceptions_enable=False, **options)
        if summary := options.get("help"):
            # A callback keeps the name of the family also when it has one verb.
            self.callback(help=summary)(lambda: None)

    def command(self, name: str | None = None, **options: Any) -> Any:
        """Register a function as a verb."""
        return super().command(name, cls=Verb, **options)


def in_order(ctx: typer.Context, **given: Sequence[Any]) -> list[Any]:
    """Values of repeatable options, by option, in the order of the command line."""
    values = {name: iter(each) for name, each in given.items()}
    return [next(values[name]) for name in ctx.meta[_ORDER] if name in values]


def read_parts(parts: Sequence["str | Path"]) -> "list[str | Image]":
    """Texts and images in order, given the images' files."""
    from moma.images import read_image

    return [
        part if isinstance(part, str) else read_image(part, "--image", "choose another")
        for part in parts
    ]


def refuse_unused(ctx: typer.Context, reason: str, *names: str) -> None:
    """Raise `UserError` if one of these options was given, which has no effect for this reason."""
    if given := [f"--{name.replace('_', '-')}" for name in names if name in ctx.meta[_ORDER]]:
        raise UserError(f"{', '.join(given)}: no effect {reason}; leave it out")


def readable_recipe(recipe: Path) -> Path:
    """Refuse a file that is not TOML at once; the verb validates its keys and values."""
    from moma.recipe import find_recipe, read_values

    read_values(recipe := find_recipe(recipe))
    return recipe


def load_recipe(path: Path, overrides: Sequence[str] | None = None) -> "Recipe":
    """Read and validate a recipe."""
    from moma.recipe import read_recipe
    from moma.train.recipe import Recipe

    return read_recipe(Recipe, path, overrides or ())


def with_data(recipe: "Recipe", data: Path | None) -> "Recipe":
    """The recipe of a run whose prepared data may have moved."""
    if data is None:
        return recipe
    from moma.data.remote.reading import read_link

    moved = recipe.data.model_copy(update={"path": data})
    folders = filter(Path.is_dir, (moved.folder(source.name) for source in moved.sources))
    if any(read_link(folder) is None for folder in folders):  # prepared there, not fetched
        moved = moved.model_copy(update={"remote": None})
    return recipe.model_copy(update={"data": moved})


def files_and_overrides(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Divide arguments into files and `key=value` overrides; a file may have `=` in its name."""
    from moma.recipe import find_recipe
    from moma.recipe_paths import parse_path

    overrides = [word for word in words if "=" in word and not os.path.isfile(word)]
    try:
        files = [find_recipe(parse_path(word)) for word in words if word not in overrides]
        return files, overrides
    except ValueError as error:
        raise UserError(f"{quote(' '.join(words))}: a file {error}") from error


def _checked(param: Any, value: Any, type_: Any) -> Any:
    """A raw value, or each of several: not empty, valid UTF-8, a usable path if it is one."""
    if isinstance(value, list | tuple):
        return type(value)(_checked(param, each, type_) for each in value)
    if not isinstance(value, str):
        return value
    from moma.recipe import leaf_types
    from moma.recipe_paths import parse_path, require_unicode

    name = param.opts[0] if param.param_type_name == "option" else param.name.upper()
    if not (value if param.name in _MODEL_TEXT else value.strip()):
        raise UserError(f"{name}: is empty; give a value (an unset shell variable is empty too)")
    try:
        return str(parse_path(value)) if Path in leaf_types(type_) else require_unicode(value)
    except ValueError as error:
        raise UserError(f"{name} {quote(value)}: {error}") from error


def _explain_override_as_option(error: Any) -> None:
    has_section = "." in error.option_name
    given = [
        text
        for text in sys.argv
        if text.startswith(f"{error.option_name}=") or (has_section and text == error.option_name)
    ]
    takes_overrides = any(parameter.name == "overrides" for parameter in error.ctx.command.params)
    similar = set(error.possibilities or ()) - {"--help"}
    if not given or not takes_overrides or (similar and not has_section):
        return
    change = given[0].lstrip("-") + ("" if "=" in given[0] else "=…")
    section = "" if has_section else ", or with its section as in pretrain.steps=100"
    raise UserError(
        f"{given[0]}: there is no such option; write a change to the recipe without dashes: "
        f"{change}{section}"
    )


def _is_output_closed() -> bool:
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _existing_run(run: Path) -> Path:
    from moma.runs import Run

    return Run(run).require().path


def _print_version(requested: bool) -> None:
    if requested:
        print(f"moma {version('moma')}")
        raise typer.Exit


RecipeFile = Annotated[
    Path, Argument(help="a recipe, such as configs/demo.toml", callback=readable_recipe)
]
Overrides = Annotated[
    list[str] | None, Argument(help="changes to the recipe, such as pretrain.steps=100")
]
RunFolder = Annotated[Path, Argument(help="a folder of `moma train`", callback=_existing_run)]
AsJson = Annotated[bool, Option("--json", help="print JSON and nothing else")]
MovedData = Annotated[Path | None, Option("--data", help="prepared data that has moved")]
CpuTime = Annotated[
    bool, Option("--cpu-time", help="measure CPU time, without that of other processes; 1 thread")
]
Version = Annotated[
    bool, Option("--version", help="print the version", callback=_print_version, is_eager=True)
]
