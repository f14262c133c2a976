"""Every kind of source: the recipes in the documentation, and what all have in common."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from moma.data.documents import SourceConfig
from moma.data.sources.registry import AnySource, source_kinds
from moma.demo.dictionary import DictionaryConfig

KINDS = tuple(source_kinds().values())
DOCS = Path(__file__).parents[3] / "docs"


def documented_sources():
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
        for block in [*blocks, *re.findall(r"\.toml <<'END'\n(.*?)END\n", text, re.DOTALL)]:
            yield from tomllib.loads(block).get("data", {}).get("sources", ())


def test_documented_sources_are_valid_and_show_every_kind_of_reader():
    read = [TypeAdapter(AnySource).validate_python(s) for s in documented_sources()]
    assert {type(source) for source in read} >= set(KINDS) - {DictionaryConfig}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_options_of_all_sources_and_its_keys_are_documented(kind):
    assert issubclass(kind, SourceConfig)
    keys = {field.alias or name for name, field in kind.model_fields.items()}
    assert keys >= {"kind", "name", "weight", "max_images", "held_out"}
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert not [key for key in keys if f"`{key}`" not in page]
    assert f"| `{kind.model_fields['kind'].default}` |" in page
