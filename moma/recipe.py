"""Recipes: TOML files that become frozen, validated configurations.

A configuration class derives from `Config` and is defined next to what it configures.
"""

import difflib
import inspect
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema

from moma.errors import UserError, quote, shorten
from moma.files import read_bounded
from moma.recipe_paths import parse_path, require_unicode

_EXAMPLE = "a TOML file such as configs/demo.toml"
# Integers are stored in 64-bit tensors.
_INTEGER_LIMIT = 2**63
# Of a recipe.
_MAX_BYTES = 2**24

Location = tuple[int | str, ...]
Models = list[type[BaseModel]]


class Config(BaseModel):
    """A section of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, values: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            value = values.get(_key(cls, name))
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, bool) for item in items):
                types = leaf_types(field.annotation)
                if {int, float} & set(types) and bool not in types:
                    raise ValueError(f"{_key(cls, name)} should be a number, not true or false")
        return values

    @field_validator("*")
    @classmethod
    def _refuse_what_cannot_be_stored(cls, value: Any) -> Any:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int) and abs(item) >= _INTEGER_LIMIT:
                raise ValueError("should be less than 2**63")
            if isinstance(item, str):
                require_unicode(item)
        return value

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The JSON schema, described by the class docstring and its `Attributes` section."""
        schema = handler(core_schema)
        found = handler.resolve_ref_schema(schema)
        summary = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
        found["description"] = " ".join(summary.split())
        for name, text in attribute_descriptions(cls).items():
            if name in cls.model_fields:
                found["properties"][_key(cls, name)]["description"] = text
        return schema


AnyConfig = TypeVar("AnyConfig", bound=Config)


def attribute_descriptions(cls: type) -> dict[str, str]:
    """Attribute descriptions in the `Attributes` sections of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        section = section.split("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


RequiredPath = Annotated[Path, BeforeValidator(parse_path)]
"""A path as `parse_path` accepts it; `RequiredPath | None` refuses an empty text as well."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seed of a random number generator."""


def read_recipe(schema: type[AnyConfig], path: Path, overrides: Iterable[str] = ()) -> AnyConfig:
    """Read a TOML recipe, apply `key.sub=value` overrides and validate it.

    A recipe with `extends = "other.toml"` (relative to itself) starts from the values of that file:
    its own tables are merged into them key by key, any other value replaces the one there. A list
    of files is merged in this order.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; the message names it.
    """
    return check(schema, read_values(path, overrides, schema), str(path))


def read_values(
    path: Path, overrides: Iterable[str] = (), schema: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Values of a recipe and what it extends, with overrides (see `override`), not validated.

    Raises:
        UserError: the file cannot be read, or there is no such key for an override.
    """
    return override(_read_toml(path, ()), overrides, schema)


def _read_toml(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in extended_by:
        raise UserError(f"{path}: extends itself, through {extended_by[-1]}; remove an 'extends'")
    try:
        values = tomllib.loads(read_bounded(path, _MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        origin = f", which {extended_by[-1]} extends" if extended_by else ""
        inside = path / "recipe.toml"
        example = inside if os.path.isfile(inside) else f"a recipe, {_EXAMPLE}"
        raise UserError(
            f"{path}: cannot read the recipe{origin} ({error.strerror}); name {example}"
        ) from error
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise UserError(f"{path}: not valid TOML ({error}); a recipe is {_EXAMPLE}") from error
    if "extends" not in values:
        return values
    given = values.pop("extends")
    merged: dict[str, Any] = {}
    for name in given if isinstance(given, list) and given else [given]:
        base = _read_toml(_extended(path, name), (*extended_by, path.resolve()))
        merged = merge_tables(merged, base)
    return merge_tables(merged, values)


def _extended(path: Path, name: object) -> Path:
    """The file that a recipe names in `extends`."""
    try:
        given = parse_path(name)
    except ValueError as error:
        raise UserError(
            f"{path}: 'extends': {error}; name a file, as base.toml, or a list of files"
        ) from error
    base: Path = path.parent / given
    if not base.exists() and (shipped := find_recipe(given)).exists():
        return shipped
    return base


def recipe_value(path: Path, *keys: str) -> str:
    """The text at a key of a recipe, for a hint; empty without such a key or recipe."""
    if path.suffix != ".toml":
        return ""  # perhaps a large file of weights
    try:
        value: Any = read_values(path)
    except UserError:
        return ""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def merge_tables(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Merge `values` into a copy of `base`: tables key by key, other values replace those there."""
    merged = dict(base)
    for key, value in values.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = merge_tables(below, value)
        merged[key] = value
    return merged


def shipped_recipe(name: str) -> Path:
    """A recipe of `configs/`: in the installed package, else in the repository.

    Raises:
        UserError: it is missing.
    """
    package = Path(__file__).parent
    for folder in (package, package.parent):
        if (folder / "configs" / name).is_file():
            return folder / "configs" / name
    raise UserError(f"configs/{name} is missing; install moma again")


def find_recipe(path: Path) -> Path:
    """Return `path`, or, where there is no such file, the shipped recipe that it names."""
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    try:
        return shipped_recipe(str(Path(*path.parts[1:])))
    except UserError:
        return path


def override(
    values: dict[str, Any], overrides: Iterable[str], schema: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Apply overrides such as `pretrain.steps=100` or `data.sources.0.weight=2` to `values`.

    A value is parsed as TOML. It is text if it is not valid TOML and begins with no quotation
    mark.

    Args:
        values: changed in place and returned.
        overrides: each `key=value`; of the same key, the last wins.
        schema: if given, a number or date for a key that takes only text stays as written, so that
            `run=2024-01-05` is a path.

    Raises:
        UserError: an override has no `=`, its text in quotation marks is not valid TOML, or its key
            leads through something that is not a table.
    """
    for text in overrides:
        key, separator, value = (part.strip() for part in text.partition("="))
        if not separator or not key:
            raise UserError(
                f"override '{shorten(text)}': write key=value, for example pretrain.steps=100"
            )
        *path, last = key.split(".")
        parsed = _parse_toml(value, text)
        if schema is not None and _is_text_key(schema, (*path, last), parsed):
            parsed = value
        node: Any = values
        try:
            for name in path:
                node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
            node[int(last) if isinstance(node, list) else last] = parsed
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"override '{shorten(text)}': there is no '{shorten(key)}' in the recipe; correct "
                "the key"
            ) from error
    return values


def check(schema: type[AnyConfig], values: dict[str, Any], origin: str) -> AnyConfig:
    """Turn plain values into a validated configuration.

    Raises:
        UserError: names `origin`, each wrong key, and the valid keys in place of an unknown one.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        messages = [
            _explain(schema, problem)
            for problem in problems
            # A list whose items have errors of their own is not too short as well.
            if problem["type"] != "too_short" or not _contains_other(problem["loc"], problems)
        ]
        raise UserError(f"{origin}: " + "; ".join(messages)) from error


def to_toml(config: Config) -> str:
    """A configuration as TOML with all keys that have a value."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def _parse_toml(value: str, text: str) -> Any:
    """The value of an override `text`; see `override`."""
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError) as error:
        if value[:1] in ('"', "'"):
            reason = str(error).partition(" (at ")[0]
            raise UserError(
                f"override {quote(text)}: not valid TOML ({reason}); close or correct its "
                "quotation marks and what is between them"
            ) from error
        return value


def _is_text_key(schema: type[BaseModel], path: tuple[str, ...], value: Any) -> bool:
    """Whether the key at `path` takes text or a path, and no scalar of the type of `value`."""
    if isinstance(value, str | list | dict):
        return False
    _, models = _resolve(schema, tuple(int(p) if p.lstrip("-").isdigit() else p for p in path))
    types = {
        leaf
        for model in models
        for name, field in model.model_fields.items()
        if _key(model, name) == path[-1]
        for leaf in leaf_types(field.annotation)
    }
    takes_numbers = isinstance(value, int | float) and {int, float, bool} & types
    return bool({str, Path} & types) and not takes_numbers


def _contains_other(location: Location, problems: list[Any]) -> bool:
    depth = len(location)
    return any(p["loc"][:depth] == location and len(p["loc"]) > depth for p in problems)


def _explain(schema: type[BaseModel], problem: Any) -> str:
    parts, models = _resolve(schema, problem["loc"])
    key = ".".join(parts)
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        return f"'{key}': {message}" if key else message
    valid = sorted({_key(model, name) for model in models for name in model.model_fields})
    close = difflib.get_close_matches(parts[-1], valid, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown key '{key}'{hint}; valid keys here: {', '.join(valid)}"


def _resolve(schema: type[BaseModel], location: Location) -> tuple[list[str], Models]:
    """Resolve a location of pydantic in a configuration.

    Returns:
        Its parts as a recipe writes them, without the tags that pydantic adds for the members of a
        union, and the models that may have its last part as a field.
    """
    parts: list[str] = []
    holders: Models = [schema]
    models = holders
    for part in location:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]  # type: ignore[index]
        tagged = [m for m in models if not fields and _tag(m) == part]
        if not tagged:
            parts.append(str(part))
        holders = models
        below = [model for field in fields for model in _models_in(field.annotation)]
        models = tagged or below or models
    return parts, holders


def _key(model: type[BaseModel], field: str) -> str:
    return model.model_fields[field].alias or field


def _tag(model: type[BaseModel]) -> object:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def leaf_types(annotation: Any) -> list[Any]:
    """The types that an annotation consists of: `int | None` gives int and NoneType."""
    arguments = getattr(annotation, "__args__", ())
    return [leaf for part in arguments for leaf in leaf_types(part)] or [annotation]


def _models_in(annotation: Any) -> Models:
    return [t for t in leaf_types(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
