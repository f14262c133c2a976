"""A folder with a recipe and its sources, and calls of the command line."""

import contextlib
import io
import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tomli_w
from PIL import Image
from typer.main import get_command

from moma.cli import root as cli
from tests.factories import values_of_recipe, write_captions, write_paragraphs

# Made once; for each call it would take longer than most verbs that refuse something.
COMMAND = get_command(cli.app)


class Outcome(NamedTuple):
    """The result of a call of the command line."""

    code: int
    out: str
    err: str


def moma(*arguments: object) -> Outcome:
    """Call the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["moma", *map(str, arguments)])
        patch.setattr(cli, "app", COMMAND)
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    return Outcome(0 if code is None else int(str(code)), out.getvalue(), err.getvalue())


def succeeds(*arguments: object) -> str:
    outcome = moma(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome.out


def refuses(*arguments: object) -> str:
    """The message of a call that must fail as with bad input."""
    outcome = moma(*arguments)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    # Progress may precede the message, nothing may follow it.
    message = outcome.err.splitlines()[-1]
    assert message.startswith("moma: ") and outcome.err.count("moma: ") == 1, outcome.err
    assert "Traceback" not in outcome.err
    return message.removeprefix("moma: ")


def make_input(folder: Path) -> Path:
    """Write twelve images with captions, a text, and a recipe for them."""
    draw = random.Random(0)
    images = {}
    for number in range(12):
        color = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
        images[f"{number}.png"] = image = Image.new("RGB", (40, 32), color)
        image.paste((255, 255, 255), (number, 4, number + 20, 24))
    write_captions(folder / "images", {f"{n}.png": f"box {n}" for n in range(12)}, images)
    words = ["red", "green", "rocket", "left", "of", "an", "apple", "schön"]
    paragraphs = (" ".join(draw.choices(words, k=12)) for _ in range(20))
    write_paragraphs(folder / "words.txt", paragraphs)
    recipe = folder / "recipe.toml"
    recipe.write_text(tomli_w.dumps(values_of_recipe(folder)))
    return recipe


def read_rows(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "images" / "captions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "images" / "captions.jsonl").write_text(text)


def complete_shards(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("data/shards/*/shard.json")}


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def routers_of(folder: Path) -> list[str]:
    return ["stage=aux_router", f"from={folder}/run", f"run={folder}/run/aux_router"]


def train(folder: Path) -> Path:
    """Fill an empty folder with sources, prepared data, a run and its routers."""
    recipe = make_input(folder)
    assert f"prepared {folder}/data" in succeeds("prepare", recipe)
    assert f"trained {folder}/run" in succeeds("train", recipe)
    assert f"trained {folder}/run/aux_router" in succeeds("train", recipe, *routers_of(folder))
    return folder
