"""`moma schema`: the keys of recipes, for editors and for the docs."""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from moma.cli.arguments import App

app = App()
Node = dict[str, Any]
Row = tuple[str, str, str, str]
_BASE_KEYS = ("kind", "name", "weight", "max_images", "held_out")


@app.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print tables of the keys instead, for the docs")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, registered sources included."""
    print(as_markdown() if markdown else json.dumps(json_schema(), indent=2))


def json_schema() -> Node:
    """The JSON schema of recipe files: the keys of `Recipe`, `extends` and `chain`."""
    from moma.train.recipe import Recipe

    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"] |= {
        "extends": {"type": "string", "description": "a recipe whose values this one starts from"},
        "chain": {
            "type": "array",
            "items": {"type": "object"},
            "description": "stages that `moma train` runs one after the other",
        },
    }
    # A recipe that extends another may leave out what that one has.
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return schema


def as_markdown() -> str:
    """Tables of all keys: one for each section, and one for each kind of source."""
    schema = json_schema()
    definitions = schema["$defs"]
    top: Node = {}
    sections: Node = {}
    for key, node in schema["properties"].items():
        is_section = "properties" in _resolved(node, definitions)
        (sections if is_section else top)[key] = node
    parts = ["### Top", _table(_rows({"properties": top}, definitions))]
    seen: dict[str, str] = {}  # definition → the first section that it describes
    for key, node in sections.items():
        name = _reference(node)
        section = definitions[name]
        rows = list(_rows(section, definitions))
        parts.append(f"### `[{key}]`")
        if name in seen:
            parts.append(f"The same keys as `[{seen[name]}]`.")
            continue
        parts.append(section["description"])
        if alike := next((first for other, first in seen.items() if name.endswith(other)), None):
            earlier = list(_rows(definitions[_reference(sections[alike])], definitions))
            rows = [row for row in rows if row not in earlier]
            parts.append(f"The same keys as `[{alike}]`, with other defaults:")
        parts.append(_table(rows))
        seen[name] = key
        if key == "data":
            parts += _source_tables(section["properties"]["sources"], definitions)
    return "\n\n".join(parts)


def _source_tables(sources: Node, definitions: Node) -> Iterator[str]:
    kinds: dict[str, str] = sources["items"]["discriminator"]["mapping"]
    members = {kind: definitions[name.rpartition("/")[2]] for kind, name in kinds.items()}
    first = next(iter(members.values()))
    base = {key: first["properties"][key] for key in _BASE_KEYS if key in first["properties"]}
    own_default = {"`kind`": "–", "`name`": "the kind", "`held_out`": "`data.held_out`"}
    rows = [
        (key, "text" if key == "`kind`" else type_, own_default.get(key, default), meaning)
        for key, type_, default, meaning in _rows({"properties": base}, definitions)
    ]
    yield "### `[[data.sources]]`"
    yield "Keys of every source; the keys of each kind follow."
    yield _table(rows)
    for kind, member in members.items():
        own = {key: node for key, node in member["properties"].items() if key not in _BASE_KEYS}
        required = member.get("required", [])
        kind_row = ("`kind`", f"`{kind}`", "–", member["description"])
        yield f"#### `{kind}`"
        yield _table([kind_row, *_rows({"properties": own, "required": required}, definitions)])


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


def _table(rows: Iterable[Row]) -> str:
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _reference(node: Node) -> str:
    return str(node.get("$ref", "")).rpartition("/")[2]


def _resolved(node: Node, definitions: Node) -> Node:
    found: Node = definitions.get(_reference(node), node)
    return found


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty"
    return f"`{json.dumps(value)}`"


def _type(node: Node, definitions: Node) -> str:
    """The type of a key in words, with its limits."""
    node = _resolved(node, definitions)
    if "anyOf" in node:
        members = [each for each in node["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(_type(each, definitions) for each in members))
    if "enum" in node or "const" in node:
        return ", ".join(_value(value) for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        items = _type(node["items"], definitions) if "items" in node else ""
        return f"list of {items}" if items else "list"
    if "oneOf" in node or node.get("type") == "object":
        return "table"
    kind: str = node.get("type", "any")
    name = "text" if kind == "string" else kind
    name = "path" if node.get("format") == "path" else name
    limits = [
        f"{sign} {json.dumps(node[key])}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in node
    ]
    return " ".join([name, ", ".join(limits)]).strip()
