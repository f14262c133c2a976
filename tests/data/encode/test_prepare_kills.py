"""`moma prepare`, killed and run again, writes the bytes of an uninterrupted run."""

import json
import random
import signal
import time
from pathlib import Path

import pytest

from tests.data.encode.preparing import contents, make_recipe, run
from tests.factories import write_recipe
from tests.processes import Command


def start(recipe_file: Path) -> Command:
    return Command(recipe_file.parent, "prepare", recipe_file, "--workers", "1", "--json")


def parts_in(folder: Path) -> int:
    return len(list(folder.glob("shards/*/train-*.arrow")))


def kill_somewhere(process: Command, folder: Path, draw: random.Random) -> None:
    """Kill a process after a few more parts, or at any time before the first one."""
    if draw.random() < 0.2:
        until, seconds = parts_in(folder) + 1, draw.uniform(0, 8)
    else:
        until, seconds = parts_in(folder) + draw.randint(1, 4), float("inf")
    end = time.monotonic() + seconds
    while parts_in(folder) < until and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.communicate()


def assert_kills_change_no_byte(tmp_path: Path, rows: int, kills: int, shard_tokens: int) -> None:
    undisturbed = make_recipe(tmp_path, rows, "undisturbed", shard_tokens=shard_tokens)
    expected = run(undisturbed)
    assert expected.sources["captions"].rejected == len(range(7, rows, 40)) > 1
    recipe = make_recipe(tmp_path, rows, "killed", shard_tokens=shard_tokens)
    write_recipe(recipe, tmp_path / "recipe.toml")
    draw = random.Random(0)
    for _ in range(kills):
        process = start(tmp_path / "recipe.toml")
        kill_somewhere(process, recipe.data.path, draw)
        assert process.returncode == -signal.SIGKILL, "the run ended before the kill: use more rows"
    process = start(tmp_path / "recipe.toml")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert json.loads(out) == {"path": str(recipe.data.path), **expected.summary()}
    assert contents(recipe.data.path) == contents(undisturbed.data.path)


def test_a_few_kills_change_no_byte(tmp_path):
    assert_kills_change_no_byte(tmp_path, rows=60, kills=2, shard_tokens=100)


@pytest.mark.slow
def test_twenty_kills_change_no_byte(tmp_path):
    assert_kills_change_no_byte(tmp_path, rows=1200, kills=20, shard_tokens=300)
