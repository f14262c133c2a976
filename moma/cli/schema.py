"""`moma schema`: the keys of recipes, for editors and for the docs."""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from typer import Option

from moma.cli.arguments import App

app = App()
Node = dict[str, Any]
Row = tuple[str, str, str, str]
_SOURCE_KEYS = ("kind", "name", "weight", "max_images", "held_out", "clean")
_SOURCE_DEFAULTS = {"`kind`": "–", "`name`": "the kind", "`held_out`": "`data.held_out`"}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


@app.command()
def schema(
    markdown: Annotated[bool, Option("--markdown", help="print tables for the docs")] = False,
) -> None:
    """Print the JSON schema of recipes, registered sources included."""
    print(as_markdown() if markdown else json.dumps(json_schema(), indent=2))


def json_schema() -> Node:
    """The JSON schema of recipe files: the keys of `Recipe`, `extends` and `chain`."""
    from moma.train.recipe import Recipe

    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"] |= {
        "extends": {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
            ],
            "description": "a recipe, or several, whose values this one starts from",
        },
        "chain": {
            "type": "array",
            "items": {"type": "object"},
            "description": "stages that `moma train` runs one after the other",
        },
    }
    # A recipe that extends another may leave out keys of that one.
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return schema


def as_markdown() -> str:
    """Tables of all keys: one for each section, and one for each kind of source."""
    schema = json_schema()
    definitions = schema["$defs"]
    sections = {key: _resolved(node, definitions) for key, node in schema["properties"].items()}
    top = {key: node for key, node in sections.items() if "properties" not in node}
    parts = ["### Top", _table(_rows({"properties": top}, definitions))]
    seen: dict[tuple[str, ...], tuple[str, list[Row]]] = {}
    for key, section in sections.items():
        if key in top:
            continue
        parts += [f"### `[{key}]`", section["description"]]
        rows = list(_rows(section, definitions))
        names = tuple(row[0] for row in rows)
        if names in seen:
            earlier, earlier_rows = seen[names]
            rows = [row for row in rows if row not in earlier_rows]
            parts.append(f"The same keys as `[{earlier}]`{', except:' if rows else '.'}")
        seen.setdefault(names, (key, rows))
        if rows:
            parts.append(_table(rows))
        if key == "data":
            parts += _source_tables(section["properties"]["sources"], definitions)
    return "\n\n".join(parts)


def _source_tables(sources: Node, definitions: Node) -> Iterator[str]:
    members = {
        kind: _resolved({"$ref": reference}, definitions)
        for kind, reference in sources["items"]["discriminator"]["mapping"].items()
    }
    first = next(iter(members.values()))["properties"]
    shared = {"properties": {key: first[key] for key in _SOURCE_KEYS}}
    yield "### `[[data.sources]]`"
    yield "Keys of every source; the keys of each kind follow."
    yield _table(
        (key, "text" if key == "`kind`" else type_, _SOURCE_DEFAULTS.get(key, default), meaning)
        for key, type_, default, meaning in _rows(shared, definitions)
    )
    for kind, member in members.items():
        own = {key: node for key, node in member["properties"].items() if key not in _SOURCE_KEYS}
        rows = _rows({**member, "properties": own}, definitions)
        yield f"#### `{kind}`"
        yield _table([("`kind`", f"`{kind}`", "–", member["description"]), *rows])


def _rows(section: Node, definitions: Node, prefix: str = "") -> Iterator[Row]:
    """Key, type, default and meaning of each key; keys of nested tables are joined by dots."""
    for key, node in section["properties"].items():
        below = _resolved(node, definitions)
        if "properties" in below:
            yield from _rows(below, definitions, f"{prefix}{key}.")
            continue
        default = "–" if key in section.get("required", []) else _value(node.get("default"))
        meaning = node.get("description", "").replace("|", "\\|")
        yield f"`{prefix}{key}`", _type(node, definitions), default, meaning
        for member in node.get("anyOf", []):  # a table that may be omitted
            if "properties" in (below := _resolved(member, definitions)):
                yield from _rows(below, definitions, f"{prefix}{key}.")


def _table(rows: Iterable[Row]) -> str:
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _resolved(node: Node, definitions: Node) -> Node:
    name = str(node.get("$ref", "")).rpartition("/")[2]
    return {**node, **definitions[name]} if name else node


def _value(value: Any) -> str:
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return "none" if value is None else f"`{json.dumps(value)}`"


def _type(node: Node, definitions: Node) -> str:
    """The type of a key in words, with its limits."""
    node = _resolved(node, definitions)
    if "anyOf" in node:
        members = [each for each in node["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(_type(each, definitions) for each in members))
    if "enum" in node or "const" in node:
        return ", ".join(_value(value) for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        return f"list of {_type(node['items'], definitions)}" if "items" in node else "list"
    if "oneOf" in node or node.get("type") == "object":
        return "table"
    name = "path" if node.get("format") == "path" else node.get("type", "any")
    limits = [f"{sign} {json.dumps(node[key])}" for key, sign in _LIMITS.items() if key in node]
    return " ".join(["text" if name == "string" else name, ", ".join(limits)]).strip()
