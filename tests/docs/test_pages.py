"""Links lead somewhere, every page is in the navigation, and every command exists."""

import ast
import functools
import json
import re
import tomllib
from typing import Any

import pytest
import typer

from moma.cli.root import app
from moma.recipe import check, read_values
from moma.train.recipe import Recipe
from tests.docs.pages import (
    DOCS,
    PAGES,
    ROOT,
    anchors,
    blocks,
    links,
    moma_arguments,
    shell_commands,
)

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    missing = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if link.startswith(("https://", "http://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_every_page_is_in_the_navigation_once():
    names = re.findall(r"\S+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    pages = [str(path.relative_to(DOCS)) for path in PAGES if path.is_relative_to(DOCS)]
    made = ["notebooks/method.md"]  # of the notebook, by a hook
    assert sorted(names) == sorted(pages + made)


def test_other_blocks_can_be_parsed():
    parsers: dict[str, Any] = {"python": ast.parse, "toml": tomllib.loads, "json": json.loads}
    for block in (block for page in PAGES for block in blocks(page)):
        texts = block.text.splitlines() if block.language == "json" else [block.text]
        for text in texts if block.language in parsers else ():
            parsers[block.language](text)


def test_every_extra_is_explained():
    page = (DOCS / "install.md").read_text()
    assert not [extra for extra in EXTRAS if f"| `{extra}` |" not in page]


@functools.cache
def verbs():
    """The command line, without checks that files exist."""
    root: Any = typer.main.get_command(app)
    for group in (root, *root.commands.values()):
        for command in getattr(group, "commands", {}).values():
            for param in command.params:
                param.callback = None
    return root


def parse(arguments):
    """Parse arguments as the command line does, without running the verb."""
    command: Any = verbs()
    context = command.make_context("moma", [], resilient_parsing=True)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        assert name in command.commands, f"no verb '{name}'"
        command = command.commands[name]
        context = type(context)(command, info_name=name, parent=context)
    values, rest, _ = command.make_parser(context).parse_args(list(arguments))
    assert not rest
    for param in command.params:
        param.process_value(context, values.get(param.name))
    return values


def require_valid(words):
    """Raise an error if a command names a target, file, extra, verb, option or key that is none."""
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    for word in words:
        if re.match(r"(configs|launch)/[\w/.]+$", word):
            assert (ROOT / word).is_file()
        for extras in re.findall(r"^(?:\.|moma)\[(.*)\]$", word):
            assert set(extras.split(",")) <= EXTRAS.keys()
    arguments = moma_arguments(words)
    if arguments in (None, ["--version"]):
        return
    given = [each for each in parse(arguments).get("overrides") or () if "=" in each]
    if changes := [each for each in given if not each.startswith(("study.", "chain."))]:
        check(Recipe, read_values(ROOT / "configs/demo.toml", changes, Recipe), " ".join(words))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```bash" in page.read_text()], ids=name
)
def test_commands_have_verbs_options_files_and_keys_that_exist(page):
    for block in blocks(page):
        for words in shell_commands(block.text) if block.language == "bash" else ():
            try:
                require_valid(words)
            except Exception as error:
                raise AssertionError(f"{page.name}: {' '.join(words)}: {error}") from error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("moma trian my.toml", "no verb 'trian'"),
        ("moma train", "(?i)missing"),
        ("moma generate runs/my --tmperature 1", "(?i)no such option"),
        ("moma generate runs/my --mode x", "not one of"),
        ("moma train my.toml pretrain.setps=1", "unknown key"),
    ],
)
def test_wrong_commands_are_found(line, message):
    (words,) = shell_commands(line)
    with pytest.raises(Exception, match=message):
        require_valid(words)


def test_the_map_of_the_code_names_every_folder_and_only_files_that_exist():
    page = (DOCS / "code.md").read_text()
    rows = [row.split("|")[2] for row in page.splitlines() if row.startswith("|")]
    rows += [
        row.split("|")[1]
        for row in page.partition("The method is in")[2].splitlines()
        if "|" in row
    ]
    named = {path for row in rows for path in re.findall(r"`([\w/]+(?:\.py|/))`", row)}
    files = {each.name for each in (ROOT / "moma").rglob("*.py")}
    assert not [path for path in named if not (ROOT / "moma" / path).exists() and path not in files]
    assert {f"{each.parent.name}/" for each in (ROOT / "moma").glob("*/__init__.py")} <= named
