"""The kinds of sources: every installed package can add its own.

A package names the configuration class of its source in the entry-point group `moma.sources`; the
entry's name is the `kind` in a recipe:

    [project.entry-points."moma.sources"]
    poems = "my_package:PoemsConfig"
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import BeforeValidator, Field

from moma.data.documents import SourceConfig
from moma.errors import quote, shorten

_GROUP = "moma.sources"


def source_kinds() -> dict[str, type[SourceConfig]]:
    """Return the configuration class of every kind of source that can be loaded."""
    return _registered()[0]


@cache
def _registered() -> tuple[dict[str, type[SourceConfig]], dict[str, str]]:
    """Configuration classes by kind, and why other kinds cannot be used."""
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=_GROUP):
        found.setdefault(entry.name, []).append(entry)
    classes: dict[str, type[SourceConfig]] = {}
    unusable: dict[str, str] = {}
    for kind, (entry, *others) in sorted(found.items()):
        if others:
            packages = " and ".join(sorted(map(_package, (entry, *others))))
            unusable[kind] = f"is registered more than once, by {packages}; uninstall all but one"
            continue
        try:
            classes[kind] = _load(entry)
        # A package that cannot be used must not break recipes that do not use it.
        except (Exception, SystemExit) as error:
            unusable[kind] = (
                f"is registered by {_package(entry)}, whose {entry.value} cannot be used "
                f"({type(error).__name__}: {shorten(str(error), 300)}); repair or uninstall it"
            )
    return classes, unusable


def _load(entry: EntryPoint) -> type[SourceConfig]:
    loaded = entry.load()
    if not isinstance(loaded, type) or not issubclass(loaded, SourceConfig):
        raise TypeError("it is not a subclass of moma.data.documents.SourceConfig")
    kind = loaded.model_fields["kind"]
    if get_args(kind.annotation) != (entry.name,) or kind.default != entry.name:
        raise TypeError(f'it does not declare kind: Literal["{entry.name}"] = "{entry.name}"')
    loaded.model_json_schema()  # raises if it cannot be a part of the recipe's schema
    return loaded


def _package(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name}" if entry.dist else "an unknown package"


def _check_kind(source: Any) -> Any:
    """Raise `ValueError` for a kind that is missing, unknown or cannot be used."""
    if not isinstance(source, dict):
        return source
    classes, unusable = _registered()
    known = ", ".join(classes)
    kind = source.get("kind")
    if kind is None:
        raise ValueError(f"needs a 'kind', one of {known}")
    if kind in unusable:
        raise ValueError(f"kind '{kind}' {unusable[kind]}")
    if kind not in classes:
        raise ValueError(f"unknown kind {quote(str(kind))}; known kinds: {known}")
    return source


if TYPE_CHECKING:
    AnySource = SourceConfig
else:
    AnySource = Annotated[
        Union[tuple(source_kinds().values())],  # noqa: UP007
        Field(discriminator="kind"),
        BeforeValidator(_check_kind),
    ]
    """A source of any kind that is registered, as a recipe configures it."""
