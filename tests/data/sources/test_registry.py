"""Sources of other packages: one that is installed and used, and some that cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from moma.data.shards import open_shards
from moma.data.sources.registry import source_kinds
from moma.vocabulary import Vocabulary
from tests.factories import tiny_recipe

ROOT = Path(__file__).parents[3]

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "poems-source"
version = "1.0"

[project.entry-points."moma.sources"]
poems = "poems_source:PoemsConfig"

[tool.setuptools]
py-modules = ["poems_source"]
"""

SOURCE = '''
from collections.abc import Iterator
from typing import Literal

from moma.data.documents import Document, Rejected, SourceConfig
from moma.data.sources.paths import fingerprint_of
from moma.recipe import RequiredPath


class PoemsConfig(SourceConfig):
    """A text file of poems, separated by lines of three asterisks.

    Attributes:
        path: the file.
    """

    kind: Literal["poems"] = "poems"
    name: str = "poems"
    path: RequiredPath

    def documents(self) -> Iterator[Document | Rejected]:
        for number, poem in enumerate(self.path.read_text("utf-8").split("***"), start=1):
            location = f"{self.path}, poem {number}"
            if poem.strip():
                yield Document(f"poem {number}", (poem.strip(),), row=location)
            else:
                yield Rejected(location, "it is empty; remove it")

    def fingerprint(self) -> str:
        return fingerprint_of([self.path])
'''


def run(*arguments, path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the package of poems is installed."""
    package, target = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("installed")
    (package / "pyproject.toml").write_text(PYPROJECT)
    (package / "poems_source.py").write_text(SOURCE)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", target]
    result = run("-m", "pip", "install", "-q", *options, package, path=target)
    assert result.returncode == 0, result.stderr
    return target


# Prints the first error of every source, and the JSON schema of all kinds.
CHECK = """
import json, sys
from pydantic import TypeAdapter, ValidationError
from moma.data.sources.registry import AnySource
adapter, errors = TypeAdapter(AnySource), []
for source in sys.argv[1:]:
    try:
        adapter.validate_python(json.loads(source))
        errors.append(None)
    except ValidationError as error:
        errors += error.errors(include_context=False, include_input=False)[:1]
print(json.dumps([errors, adapter.json_schema()]))
"""


def write_recipe(folder, **source):
    recipe = tiny_recipe(folder, folder / "data")
    values = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    values["data"] |= {"image_share": 0.0, "max_rejected": 0.5, "sources": [source]}
    (folder / "recipe.toml").write_text(tomli_w.dumps(values))
    return folder / "recipe.toml"


def test_a_source_of_another_package_is_prepared(installed, tmp_path):
    poems = [f"A line about the number {n},\nand a second one." for n in range(20)]
    (tmp_path / "poems.txt").write_text("\n***\n".join([*poems, ""]))
    recipe = write_recipe(tmp_path, kind="poems", path=str(tmp_path / "poems.txt"), held_out=0.3)
    result = run("-m", "moma", "prepare", recipe, path=installed)
    assert result.returncode == 0, result.stderr
    rejected = json.loads((tmp_path / "data" / "rejected.jsonl").read_text())
    assert rejected["reason"] == "it is empty; remove it"
    vocabulary = Vocabulary.load(tmp_path / "data" / "vocabulary.json")
    splits = open_shards(tmp_path / "data" / "shards" / "poems", vocabulary).splits.values()
    names = {split.name(row) for split in splits for row in range(len(split))}
    assert names == {f"poem {n}" for n in range(1, 21)}


def register(folder, package, **kinds):
    """Write the metadata of an installed package that registers kinds of sources."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{kind} = {value}" for kind, value in kinds.items()]
    (info / "entry_points.txt").write_text("\n".join(["[moma.sources]", *lines]))


UNUSABLE = ("missing", "exits", "twice", "no_class", "wrong_kind", "unresolved", "text", "nothing")


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What `CHECK` prints where a package can be used, `good`, and others cannot."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "broken.py").write_text("raise SystemExit('an old library')")
    (folder / "other.py").write_text(SOURCE)
    unresolved = SOURCE.replace('"poems"', '"unresolved"').replace(": RequiredPath", ": 'Missing'")
    (folder / "unresolved.py").write_text(unresolved)
    register(
        folder, "first", missing="no_such_module:Config", exits="broken:Config", twice="a:B",
        no_class="json:loads", wrong_kind="other:PoemsConfig", unresolved="unresolved:PoemsConfig",
    )  # fmt: skip
    register(folder, "second", twice="a:B", text="a:B", good="good:PoemsConfig")
    (folder / "good.py").write_text(SOURCE.replace('"poems"', '"good"'))
    sources: list[dict[str, object]] = [
        {"kind": kind, "path": "x"} for kind in (*UNUSABLE, "captions", "good")
    ]
    sources.append({"kind": "good", "path": "x", "wrong": 1})
    return json.loads(run("-c", CHECK, *map(json.dumps, sources), path=folder).stdout)


def test_the_keys_of_a_source_of_another_package_are_validated(checked):
    (*_, error), schema = checked
    assert error["type"] == "extra_forbidden" and error["loc"] == ["good", "wrong"]
    assert set(schema["$defs"]["PoemsConfig"]["properties"]) >= {"path", "max_images"}


def test_packages_that_cannot_be_used_are_named_and_break_no_other_recipe(checked):
    errors, _ = checked
    assert errors[-3:-1] == [None, None]
    messages = {kind: error["msg"] for kind, error in zip(UNUSABLE, errors, strict=False)}
    for kind, parts in {
        "missing": ["'missing'", "the package first", "no_such_module"],
        "exits": ["the package first", "broken:Config", "an old library"],
        "twice": ["more than once, by the package first and the package second"],
        "no_class": ["not a subclass of moma.data.documents.SourceConfig"],
        "wrong_kind": ['does not declare kind: Literal["wrong_kind"]'],
        "unresolved": ["the package first", "Missing"],
        "text": ["by the package moma and the package second; uninstall"],
        "nothing": ["unknown kind 'nothing'; known kinds: captions, dataset", "good"],
    }.items():
        assert all(part in messages[kind] for part in parts), messages[kind]


def test_the_kinds_of_this_package_are_registered():
    assert set(source_kinds()) >= {"captions", "dataset", "folder", "html", "interleaved", "text"}
