"""`moma schema`: every key of a recipe, for editors and for the docs."""

import json
from pathlib import Path

from moma.cli.schema import as_markdown, json_schema
from moma.data.sources.registry import source_kinds
from tests.command_line import succeeds

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
BEGIN, END = "<!-- keys: begin (make docs-keys) -->\n", "<!-- keys: end -->"


def nodes(value):
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, dict | list):
            yield from nodes(each)


def test_the_schema_describes_every_key_and_registered_source():
    schema = json.loads(succeeds("schema"))
    definitions = schema["$defs"]
    assert schema["$schema"].endswith("2020-12/schema")
    for node in nodes(schema):
        if isinstance(reference := node.get("$ref"), str):
            assert reference.removeprefix("#/$defs/") in definitions
    sources = definitions["DataConfig"]["properties"]["sources"]["items"]["discriminator"]
    assert sources["mapping"].keys() == source_kinds().keys()
    assert definitions["DataConfig"]["additionalProperties"] is False
    assert "seed" in schema["properties"]["seed"]["description"]
    assert {"extends", "chain", "from"} <= schema["properties"].keys()
    assert "from_" not in schema["properties"]


def test_every_key_of_a_recipe_has_a_meaning():
    rows = [line for line in as_markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.rstrip(" |").endswith(("–", "none`"))]
    assert not [row for row in rows if not row.rstrip("|").rpartition("|")[2].strip()]


def test_the_tables_of_the_docs_are_generated_from_the_schema():
    page = PAGE.read_text(encoding="utf-8")
    found = page.partition(BEGIN)[2].partition(END)[0]
    assert found.strip() == as_markdown().strip(), "docs/recipes.md is stale: run `make docs-keys`"


def test_every_number_has_a_lower_limit():
    numbers = [node for node in nodes(json_schema()) if node.get("type") in ("integer", "number")]
    assert len(numbers) > 50
    assert not [node for node in numbers if not node.keys() & {"minimum", "exclusiveMinimum"}]
