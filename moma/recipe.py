"""Recipes: TOML files that become frozen, checked configurations.

Each configuration class stands beside what it configures and derives from `Config`;
this module only reads, overrides, checks and writes them.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from moma.errors import UserError

_EXAMPLE = "a TOML file such as configs/demo.toml"


class Config(BaseModel):
    """A section of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def _require_path(value: Any) -> Any:
    """Refuse what `Path` would read as the working directory or the system as no path at all."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty, perhaps from an unset shell variable; name a path")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("contains a NUL character; name a path")
    return value


def _expand_user(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # `~name` of an unknown user
        raise ValueError(f"{error}; name a path") from error


RequiredPath = Annotated[Path, BeforeValidator(_require_path), AfterValidator(_expand_user)]
"""A path that is not empty and has its `~` expanded."""


def read_recipe(schema: type[AnyConfig], path: Path, overrides: Iterable[str] = ()) -> AnyConfig:
    """Read a TOML recipe, apply `key.sub=value` overrides, and check it.

    A recipe that says `extends = "other.toml"` (relative to itself) starts from that file's values:
    its own tables are laid over them key by key, anything else takes the place of what was there.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong; the message names it.
    """
    return check(schema, read_values(path, overrides), str(path))


def read_values(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a TOML recipe with what it extends and with overrides, as plain values, unchecked.

    Raises:
        UserError: the file cannot be read, or an override leads nowhere.
    """
    return override(_read_toml(path, ()), overrides)


def _read_toml(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """Values of a file over those of the file that it extends, and so on."""
    if path.resolve() in extended_by:
        raise UserError(f"{path}: extends itself, by way of {extended_by[-1]}; remove an 'extends'")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        origin = f", which {extended_by[-1]} extends" if extended_by else ""
        inside = path / "recipe.toml"
        meant = inside if os.path.isfile(inside) else f"a recipe, {_EXAMPLE}"
        raise UserError(
            f"{path}: cannot read the recipe{origin} ({error.strerror}); name {meant}"
        ) from error
    except ValueError as error:  # TOML's own, and bytes that are no UTF-8
        raise UserError(f"{path}: not valid TOML ({error}); a recipe is {_EXAMPLE}") from error
    if "extends" not in values:
        return values
    base = values.pop("extends")
    if not isinstance(base, str):
        raise UserError(f"{path}: 'extends': name one file, such as \"base.toml\"")
    return merge_tables(_read_toml(path.parent / base, (*extended_by, path.resolve())), values)


def recipe_value(path: Path, *keys: str) -> str:
    """The text at a key of a recipe, for a hint; empty if there is none, or no recipe."""
    if path.suffix != ".toml":
        return ""  # perhaps a file of weights, not to be read for a hint
    try:
        value: Any = read_values(path)
    except (UserError, ValueError, RecursionError):
        return ""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def merge_tables(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values over others: tables key by key, anything else takes the place of what was there."""
    merged = dict(base)
    for key, value in values.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = merge_tables(below, value)
        merged[key] = value
    return merged


def shipped_recipe(name: str) -> Path:
    """A recipe of `configs/`: beside the modules when installed, in the repository otherwise.

    Raises:
        UserError: it is not there.
    """
    package = Path(__file__).parent
    for folder in (package, package.parent):
        if (folder / "configs" / name).is_file():
            return folder / "configs" / name
    raise UserError(f"configs/{name} is missing; install moma again")


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply overrides such as `pretrain.steps=100` or `data.sources.0.weight=2` to `values`.

    Raises:
        UserError: an override has no `=`, or its path leads through something that is no table.
    """
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise UserError(f"override '{text}': write key=value, for example pretrain.steps=100")
        *path, last = key.strip().split(".")
        node: Any = values
        try:
            for name in path:
                node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
            node[int(last) if isinstance(node, list) else last] = _parse(value.strip())
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"override '{text}': there is no '{key}' in the recipe") from error
    return values


def check(schema: type[AnyConfig], values: dict[str, Any], origin: str) -> AnyConfig:
    """Turn plain values into a checked configuration.

    Raises:
        UserError: names `origin`, the key at fault, and the valid keys if it is unknown.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        told = [
            _explain(schema, problem)
            for problem in problems
            # A list that lost its members to errors of their own is not short as well.
            if problem["type"] != "too_short" or not _is_within(problem["loc"], problems)
        ]
        raise UserError(f"{origin}: " + "; ".join(told)) from error


def write_recipe(config: Config, path: Path) -> None:
    """Write a configuration as TOML, every key spelled out; keys without a value are left out."""
    values = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    path.write_text(tomli_w.dumps(values), encoding="utf-8")


def _parse(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _is_within(location: tuple[int | str, ...], problems: list[Any]) -> bool:
    """Whether a problem lies inside of what `location` points to."""
    depth = len(location)
    return any(p["loc"][:depth] == location and len(p["loc"]) > depth for p in problems)


def _explain(schema: type[BaseModel], problem: Any) -> str:
    key = ".".join(_written(schema, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        told = problem["msg"].removeprefix("Value error, ")
        return f"'{key}': {told}" if key else told
    valid = sorted(_keys_beside(schema, problem["loc"]))
    close = difflib.get_close_matches(str(problem["loc"][-1]), valid, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return f"unknown key '{key}'{hint}; valid keys here: {', '.join(valid)}"


def _keys_beside(schema: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """Names of the fields that are allowed where `location` points to an unknown one."""
    candidates = [schema]
    for part in location[:-1]:
        candidates = _below(candidates, part)
    return {
        field.alias or name for model in candidates for name, field in model.model_fields.items()
    }


def _written(schema: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """A location as recipes write it: without pydantic's names for members of a tagged union."""
    candidates, written = [schema], []
    for part in location:
        is_key = any(part in model.model_fields for model in candidates)
        if is_key or not any(_has_tag(model, part) for model in candidates):
            written.append(str(part))
        candidates = _below(candidates, part)
    return written


def _below(candidates: list[type[BaseModel]], part: int | str) -> list[type[BaseModel]]:
    """The models that one more part of a location leads to from any of `candidates`."""
    following = [
        model.model_fields[part].annotation
        for model in candidates
        if isinstance(part, str) and part in model.model_fields
    ]
    candidates = [model for kind in following for model in _models_in(kind)] or candidates
    return [model for model in candidates if _has_tag(model, part)] or candidates


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _has_tag(model: type[BaseModel], tag: int | str) -> bool:
    """Whether `model` is the member of a tagged union that pydantic names `tag`."""
    return "kind" in model.model_fields and model.model_fields["kind"].default == tag
