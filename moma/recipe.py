"""Recipes: TOML files that become frozen, checked configurations.

Each configuration class derives from `Config` and is defined next to what it configures; this
module reads, overrides, checks and writes them.
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

from moma.errors import UserError

_EXAMPLE = "a TOML file such as configs/demo.toml"
# Integers end up in 64-bit tensors, and strings in UTF-8 files.
_INTEGER_LIMIT = 2**63


class Config(BaseModel):
    """A section of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The JSON schema, with descriptions from the docstring and its `Attributes` section."""
        schema = handler(core_schema)
        found = handler.resolve_ref_schema(schema)
        found["description"] = _paragraphs(cls.__doc__ or "")[0]
        for name, text in attribute_descriptions(cls).items():
            if name in cls.model_fields:
                key = cls.model_fields[name].alias or name
                found["properties"][key]["description"] = text
        return schema

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_is_a_number(cls, values: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            if isinstance(values.get(field.alias or name), bool):
                types = set(_leaf_types(field.annotation))
                if types & {int, float} and bool not in types:
                    raise ValueError(f"{field.alias or name} should be a number, not true or false")
        return values

    @field_validator("*")
    @classmethod
    def _can_be_stored(cls, value: Any) -> Any:
        """Refuse integers that are longer than 64 bits, and text that is not Unicode."""
        if isinstance(value, int) and abs(value) >= _INTEGER_LIMIT:
            raise ValueError("should be less than 2**63")
        return require_unicode(value) if isinstance(value, str) else value


def attribute_descriptions(cls: type) -> dict[str, str]:
    """What the `Attributes` sections of a class and its bases say about each attribute."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        section = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")[2]
        section = section.split("\n\n")[0]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _paragraphs(doc: str) -> list[str]:
    return [" ".join(text.split()) for text in inspect.cleandoc(doc).split("\n\n")]


AnyConfig = TypeVar("AnyConfig", bound=Config)


def require_unicode(text: str) -> str:
    """Return `text`; refuse NUL characters and bytes that are not UTF-8.

    Raises:
        ValueError: it holds such a character.
    """
    if "\0" in text:
        raise ValueError("contains a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid UTF-8") from error
    return text


def _check_path(value: Any) -> Any:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError("should be a path in quotes")
    if not value.strip():
        raise ValueError("the path is empty; write one (an unset shell variable is empty too)")
    try:
        return Path(require_unicode(value)).expanduser()
    except RuntimeError as error:
        raise ValueError("no such user; write ./~… for a name that starts with ~") from error


RequiredPath = Annotated[Path, BeforeValidator(_check_path)]
"""A path that is not empty; a leading `~` is the home folder. Also for options that may be None:
`tokenizers: RequiredPath | None = None` refuses an empty text as well."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of random choices."""


def read_recipe(schema: type[AnyConfig], path: Path, overrides: Iterable[str] = ()) -> AnyConfig:
    """Read a TOML recipe, apply `key.sub=value` overrides, and check it.

    A recipe with `extends = "other.toml"` (relative to itself) starts from that file's values: its
    own tables are merged into them key by key, any other value replaces the one there.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; the message names it.
    """
    return check(schema, read_values(path, overrides, schema), str(path))


def read_values(
    path: Path, overrides: Iterable[str] = (), schema: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Read a TOML recipe, including what it extends, and apply overrides; values are not checked.

    Args:
        path: the recipe.
        overrides: see `override`.
        schema: see `override`.

    Raises:
        UserError: the file cannot be read, or there is no such key for an override.
    """
    return override(_read_toml(path, ()), overrides, schema)


def _read_toml(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """Values of a file merged into those of the file that it extends, recursively."""
    if path.resolve() in extended_by:
        raise UserError(f"{path}: extends itself, by way of {extended_by[-1]}; remove an 'extends'")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        origin = f", which {extended_by[-1]} extends" if extended_by else ""
        inside = path / "recipe.toml"
        example = inside if os.path.isfile(inside) else f"a recipe, {_EXAMPLE}"
        raise UserError(
            f"{path}: cannot read the recipe{origin} ({error.strerror}); name {example}"
        ) from error
    except (ValueError, RecursionError) as error:  # TOML's own, bytes that are not UTF-8, nesting
        raise UserError(f"{path}: not valid TOML ({error}); a recipe is {_EXAMPLE}") from error
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str) or not base.strip() or "\0" in base:
        raise UserError(f"{path}: 'extends': name one file, such as \"base.toml\"")
    return merge_tables(_read_toml(path.parent / base, (*extended_by, path.resolve())), values)


def recipe_value(path: Path, *keys: str) -> str:
    """The string at a key of a recipe, for a hint; empty if there is none, or no recipe."""
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
    """A recipe of `configs/`: inside the package when installed, else in the repository.

    Raises:
        UserError: it is missing.
    """
    package = Path(__file__).parent
    for folder in (package, package.parent):
        if (folder / "configs" / name).is_file():
            return folder / "configs" / name
    raise UserError(f"configs/{name} is missing; install moma again")


def override(
    values: dict[str, Any], overrides: Iterable[str], schema: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Apply overrides such as `pretrain.steps=100` or `data.sources.0.weight=2` to `values`.

    A value is parsed as TOML, and taken as a string if it is not TOML.

    Args:
        values: changed in place and returned.
        overrides: `key=value` each; of the same key, the last wins.
        schema: if given, a number or date for a key that takes only text stays as it was written,
            so that `run=2024-01-05` is a path.

    Raises:
        UserError: an override has no `=`, or its key leads through something that is not a table.
    """
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UserError(f"override '{text}': write key=value, for example pretrain.steps=100")
        *path, last = key.strip().split(".")
        parsed = _parse(value.strip())
        if schema is not None and _is_text_key(schema, (*path, last), parsed):
            parsed = value.strip()
        node: Any = values
        try:
            for name in path:
                node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
            node[int(last) if isinstance(node, list) else last] = parsed
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"override '{text}': there is no '{key}' in the recipe") from error
    return values


def check(schema: type[AnyConfig], values: dict[str, Any], origin: str) -> AnyConfig:
    """Turn plain values into a checked configuration.

    Raises:
        UserError: names `origin`, each wrong key, and the valid keys if it is unknown.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        messages = [
            _explain(schema, problem)
            for problem in problems
            # A list whose items have errors of their own is not too short as well.
            if problem["type"] != "too_short" or not _is_within(problem["loc"], problems)
        ]
        raise UserError(f"{origin}: " + "; ".join(messages)) from error


def to_toml(config: Config) -> str:
    """A configuration as TOML with all keys; keys without a value are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", by_alias=True, exclude_none=True))


def write_recipe(config: Config, path: Path) -> None:
    """Write a configuration as TOML with all keys; keys without a value are left out."""
    path.write_text(to_toml(config), encoding="utf-8")


def _parse(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return value


def _is_text_key(schema: type[BaseModel], path: tuple[str, ...], value: Any) -> bool:
    """Whether `path` leads to a key that takes text or a path, and nothing of the type of `value`.

    Tables and lists are never taken for text.
    """
    if isinstance(value, str | list | dict):
        return False
    candidates = [schema]
    for part in path[:-1]:
        candidates = _below(candidates, int(part) if part.lstrip("-").isdigit() else part)
    types = [
        leaf
        for model in candidates
        for name, field in model.model_fields.items()
        if (field.alias or name) == path[-1]
        for leaf in _leaf_types(field.annotation)
    ]
    takes_numbers = isinstance(value, int | float) and {int, float, bool} & set(types)
    return bool({str, Path} & set(types)) and not takes_numbers


def _is_within(location: tuple[int | str, ...], problems: list[Any]) -> bool:
    """Whether a problem is inside of what `location` points to."""
    depth = len(location)
    return any(p["loc"][:depth] == location and len(p["loc"]) > depth for p in problems)


def _explain(schema: type[BaseModel], problem: Any) -> str:
    key = ".".join(_without_tags(schema, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        return f"'{key}': {message}" if key else message
    valid = sorted(_keys_beside(schema, problem["loc"]))
    close = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown key '{key}'{hint}; valid keys here: {', '.join(valid)}"


def _keys_beside(schema: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Names of the fields that are valid where `location` points to an unknown one."""
    candidates = [schema]
    for part in location[:-1]:
        candidates = _below(candidates, part)
    return {
        field.alias or name for model in candidates for name, field in model.model_fields.items()
    }


def _without_tags(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """A location without pydantic's names for members of a tagged union, as recipes write it."""
    candidates, parts = [schema], []
    for part in location:
        is_key = any(part in model.model_fields for model in candidates)
        if is_key or not any(_has_tag(model, part) for model in candidates):
            parts.append(str(part))
        candidates = _below(candidates, part)
    return parts


def _below(candidates: list[type[BaseModel]], part: int | str) -> list[type[BaseModel]]:
    """The models that one more part of a location leads to from any of `candidates`."""
    following = [
        model.model_fields[part].annotation
        for model in candidates
        if isinstance(part, str) and part in model.model_fields
    ]
    candidates = [model for kind in following for model in models_in(kind)] or candidates
    return [model for model in candidates if _has_tag(model, part)] or candidates


def _leaf_types(annotation: Any) -> list[Any]:
    """The types that an annotation is made of: `int | None` gives int and NoneType."""
    arguments = getattr(annotation, "__args__", ())
    return [leaf for part in arguments for leaf in _leaf_types(part)] or [annotation]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The configurations that an annotation is made of: the members of a union, say."""
    return [
        leaf
        for leaf in _leaf_types(annotation)
        if isinstance(leaf, type) and issubclass(leaf, BaseModel)
    ]


def _has_tag(model: type[BaseModel], tag: int | str) -> bool:
    """Whether `model` is the member of a tagged union that pydantic names `tag`."""
    return "kind" in model.model_fields and model.model_fields["kind"].default == tag
