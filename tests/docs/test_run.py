"""The commands and scripts that pages mark to be run, in their order, on a small run."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from PIL import Image

from moma.recipe import override
from tests.command_line import succeeds
from tests.docs.pages import PAGES, ROOT, Block, blocks, moma_arguments, shell_commands

MARKED = {page: [block for block in blocks(page) if block.mark] for page in PAGES}


def is_slow(block: Block) -> bool:
    return block.mark.endswith("slow")


def page_tests():
    for page, marked in MARKED.items():
        name = str(page.relative_to(ROOT))
        if fast := [block for block in marked if not is_slow(block)]:
            yield pytest.param(fast, id=name)
        if len(fast) < len(marked):
            yield pytest.param(marked, id=f"{name}, all", marks=pytest.mark.slow)


@pytest.fixture
def my_folder(trained, tmp_path, monkeypatch):
    """What the pages call `my.toml`, `runs/my` and `data/my`, with an image and prompts."""
    for name, copy in {"run": "runs/my", "data": "data/my", "images": "images"}.items():
        shutil.copytree(trained / name, tmp_path / copy)
    shutil.copy(trained / "words.txt", tmp_path)
    recipe = tomllib.loads((trained / "recipe.toml").read_text())
    recipe |= {"run": "runs/my", "upcycle": recipe["pretrain"]}
    recipe["data"]["path"] = "data/my"
    (tmp_path / "my.toml").write_text(tomli_w.dumps(recipe))
    Image.new("RGB", (40, 32), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("my_folder")
@pytest.mark.parametrize("marked", page_tests())
def test_marked_blocks_run(marked):
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in marked:
        if block.mark.startswith("save: "):
            save(block)
    for block in marked:
        if block.mark.startswith("save: "):
            continue
        if block.language == "python":
            exec(compile(block.text, block.page.name, "exec"), names)
        else:
            for words in shell_commands(block.text):
                run(words)


def save(block: Block) -> None:
    """Write the file that a block shows, a recipe with the changes in the mark."""
    name, *changes = block.mark.removeprefix("save: ").split()
    if name == "my.toml":  # the page makes what others use
        shutil.rmtree("runs/my")
        shutil.rmtree("data/my")
    if not changes:
        Path(name).write_text(block.text)
        return
    Path(name).write_text(tomli_w.dumps(override(tomllib.loads(block.text), changes)))


def run(words: list[str]) -> None:
    if words[0] == "torchrun":
        launcher = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        subprocess.run(launcher, check=True, capture_output=True)
        return
    arguments = moma_arguments(words)
    assert arguments, f"{words[0]}: the test runs moma, torchrun and Python only"
    succeeds(*arguments)
