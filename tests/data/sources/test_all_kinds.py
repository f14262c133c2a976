"""Every kind of source: the recipes in the documentation, and what all have in common."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from moma.data.documents import Rejected, SourceConfig
from moma.data.sources.registry import AnySource, source_kinds
from moma.demo.dictionary import DictionaryConfig
from moma.errors import UserError

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


def test_the_documented_example_of_a_source_works_and_refuses_a_missing_folder(tmp_path):
    page = (DOCS / "extend.md").read_text(encoding="utf-8")
    code = next(iter(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    names: dict[str, Any] = {"__name__": "moma_srt"}
    exec(code, names)
    config = names["SubtitlesConfig"]
    with pytest.raises(UserError, match="missing: cannot read it"):
        list(config(path=tmp_path / "missing").documents())
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\nthere\n")
    before = config(path=tmp_path).fingerprint()
    (tmp_path / "b.srt").write_text("1\n")
    assert config(path=tmp_path).fingerprint() != before
    document, rejected = config(path=tmp_path).documents()
    assert (document.name, document.segments) == ("a.srt", ("Hello there",))
    assert isinstance(rejected, Rejected)


MISSING = {"sketches": None, "dictionary": None, "dataset": "missing.jsonl"}


@pytest.mark.parametrize("kind", [k for k in source_kinds() if MISSING.get(k, "") is not None])
def test_missing_files_and_folders_are_refused(tmp_path, kind):
    path = tmp_path / MISSING.get(kind, "missing")
    source = TypeAdapter(AnySource).validate_python({"kind": kind, "path": str(path)})
    with pytest.raises(UserError, match="missing"):
        list(source.documents())
    with pytest.raises(UserError, match="missing"):
        source.fingerprint()


def test_the_demo_refuses_packages_without_their_files(tmp_path):
    """In another process: this one may have found the files already."""
    code = """
import pathlib, sys
from moma.demo import drawings
from moma.errors import UserError
drawings.package_folder = lambda module, package: pathlib.Path(sys.argv[1])
try:
    drawings.drawings()
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    message = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "no *.png; run pip install" in message


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_options_of_all_sources_and_its_keys_are_documented(kind):
    assert issubclass(kind, SourceConfig)
    keys = {field.alias or name for name, field in kind.model_fields.items()}
    assert keys >= {"kind", "name", "weight", "max_images", "held_out", "clean"}
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert not [key for key in keys if f"`{key}`" not in page and f"`{key}." not in page]
    assert f"| `{kind.model_fields['kind'].default}` |" in page
