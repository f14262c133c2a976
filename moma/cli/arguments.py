"""Arguments that several verbs take, checked before a verb imports what takes seconds (torch)."""

import os
import select
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from moma.errors import UserError

# Options whose value is text for a model: it may be empty, and any bytes.
_FREE_TEXT = {"prompt", "text"}
_ORDER = "moma.order"
COUNT_LIMIT = 1_000_000_000
"""Largest value of an option that counts something."""


class ClosedOutputError(Exception):
    """Whoever reads standard output has stopped, as `head` does."""


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
        parse: Callable[..., Any] = parser.parse_args

        def parse_and_check(args: list[str]) -> Any:
            values, rest, order = parse(args=args)
            options = [param for param in order if param.param_type_name == "option"]
            _refuse_repeated(options)
            for param in dict.fromkeys(order):
                if param.name not in _FREE_TEXT and param.name in values:
                    values[param.name] = _checked(param, values[param.name])
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

    def command(self, name: str | None = None, **options: Any) -> Any:
        """Register a function as a verb."""
        return super().command(name, cls=Verb, **options)


def in_order(ctx: typer.Context, **given: Sequence[Any]) -> list[Any]:
    """Values of options that may be repeated, in the order of the command line.

    Args:
        ctx: of the verb.
        **given: the values of each option, by its name.
    """
    values = {name: iter(each) for name, each in given.items()}
    return [next(values[name]) for name in ctx.meta[_ORDER] if name in values]


def readable_recipe(recipe: Path) -> Path:
    """Refuse a file that is not TOML at once; the verb checks its keys and values."""
    from moma.recipe import read_values

    read_values(recipe)
    return recipe


def _refuse_repeated(options: Sequence[Any]) -> None:
    """Refuse an option that is given twice but has one value: the first would be ignored."""
    for param in options:
        if options.count(param) > 1 and not (param.multiple or param.is_flag):
            raise UserError(f"{param.opts[0]}: given {options.count(param)} times; give it once")


def _checked(param: Any, value: Any) -> Any:
    """A raw value, or several: not empty, Unicode, a leading `~` expanded."""
    if isinstance(value, list | tuple):
        return type(value)(_checked(param, each) for each in value)
    if not isinstance(value, str):
        return value
    from moma.recipe import require_unicode

    is_option = param.param_type_name == "option"
    name = param.opts[0] if is_option else param.name.upper()
    if not value.strip():
        raise UserError(f"{name}: is empty; give a value (an unset shell variable is empty too)")
    try:
        require_unicode(value)
    except ValueError as error:
        raise UserError(f"{name} {value!a}: {error}") from error
    return os.path.expanduser(value)


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
    """Whether nobody reads standard output or error any more."""
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
    Path,
    typer.Argument(help="a recipe, such as configs/demo.toml", callback=readable_recipe),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="changes to the recipe, such as pretrain.steps=100")
]
RunFolder = Annotated[
    Path, typer.Argument(help="a folder that `moma train` wrote", callback=_existing_run)
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON and nothing else")]
CpuTime = Annotated[
    bool,
    typer.Option("--cpu-time", help="measure CPU time, without that of other processes; 1 thread"),
]
Version = Annotated[
    bool,
    typer.Option("--version", help="print the version", callback=_print_version, is_eager=True),
]
