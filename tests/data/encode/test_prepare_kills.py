"""`moma prepare`, killed and run again, writes the bytes of an uninterrupted run."""

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.data.encode.preparing import contents, make_recipe, run
from tests.factories import write_recipe
from tests.processes import Command


def start(recipe_file: Path, processes: int) -> Command:
    options = "--processes", processes, "--json"
    return Command(recipe_file.parent, "prepare", recipe_file, *options)


def parts_in(folder: Path) -> int:
    return len(list(folder.glob("shards/*/train-*.arrow")))


def wait_somewhere(process: Command, folder: Path, draw: random.Random) -> None:
    """Wait until there are a few more files, or any time before the first one."""
    if draw.random() < 0.2:
        until, seconds = parts_in(folder) + 1, draw.uniform(0, 8)
    else:
        until, seconds = parts_in(folder) + draw.randint(1, 4), float("inf")
    end = time.monotonic() + seconds
    while parts_in(folder) < until and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.02))
    assert process.poll() is None, "the run ended before the kill: use more rows"


def writers(folder: Path) -> list[int]:
    """The processes that have an unfinished file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            target = os.readlink(link)
            if target.startswith(str(folder / "shards")) and target.endswith(".writing"):
                found.add(int(link.parts[2]))
    return sorted(found)


def kill(process: Command, folder: Path, draw: random.Random) -> bool:
    """Kill the process, or one that encodes for it; return whether the process goes on."""
    others = [other for other in writers(folder) if other != process.pid]
    if others and draw.random() < 0.5:
        with suppress(ProcessLookupError):
            os.kill(draw.choice(others), signal.SIGKILL)
        return True
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return False


def assert_kills_change_no_byte(
    tmp_path: Path, processes: int, rows: int, kills: int, shard_tokens: int
) -> None:
    parts = {"shard_tokens": shard_tokens, "part_bytes": 10 * 2**17}
    undisturbed = make_recipe(tmp_path, rows, "undisturbed", **parts)
    expected = run(undisturbed, processes=1)
    assert expected.sources["captions"].rejected == len(range(7, rows, 40)) > 1
    recipe = make_recipe(tmp_path, rows, "killed", **parts)
    write_recipe(recipe, tmp_path / "recipe.toml")
    draw = random.Random(0)
    goes_on = False
    for _ in range(kills):
        if not goes_on:
            process = start(tmp_path / "recipe.toml", processes)
        wait_somewhere(process, recipe.data.path, draw)
        goes_on = kill(process, recipe.data.path, draw)
    if not goes_on:
        process = start(tmp_path / "recipe.toml", processes)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert json.loads(out) == {"path": str(recipe.data.path), **expected.summary()}
    assert contents(recipe.data.path) == contents(undisturbed.data.path)


def test_a_few_kills_change_no_byte(tmp_path):
    assert_kills_change_no_byte(tmp_path, processes=1, rows=60, kills=2, shard_tokens=100)


@pytest.mark.slow
def test_twenty_kills_change_no_byte(tmp_path):
    assert_kills_change_no_byte(tmp_path, processes=2, rows=1200, kills=20, shard_tokens=300)
