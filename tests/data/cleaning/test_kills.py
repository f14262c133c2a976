"""`moma prepare` of sources that are cleaned, killed at random times and run again."""

import random
import signal
import time

import pytest

from moma.data.cleaning.config import CleaningConfig
from tests.data.encode.preparing import contents, make_recipe, run
from tests.factories import write_recipe
from tests.processes import Command

CLEAN = {
    "captions": CleaningConfig(near_duplicate_texts=1, near_duplicate_ngram=1, min_image_side=5),
    "text": CleaningConfig(near_duplicate_texts=0.9, near_duplicate_ngram=1, duplicate_texts=True),
}


def cleaned_recipe(folder, data):
    recipe = make_recipe(folder, 120, data, shard_tokens=300, part_bytes=1000)
    sources = [
        source.model_copy(update={"clean": CLEAN[source.name]}) for source in recipe.data.sources
    ]
    changes = {"data": recipe.data.model_copy(update={"sources": tuple(sources)})}
    return recipe.model_copy(update=changes)


@pytest.mark.slow
def test_kills_at_random_times_change_no_byte(tmp_path):
    expected = run(cleaned_recipe(tmp_path, "undisturbed")).summary()
    assert sum(expected["dropped"].values()) > 5
    recipe = cleaned_recipe(tmp_path, "killed")
    write_recipe(recipe, tmp_path / "recipe.toml")
    draw, kills, state = random.Random(0), 0, None
    while state != 0:
        process = Command(tmp_path, "prepare", tmp_path / "recipe.toml", "--json")
        # Later each time, so that the last one ends.
        end = time.monotonic() + draw.uniform(0, 1 + kills)
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        state = process.returncode
        kills += state == -signal.SIGKILL
        assert state in (0, -signal.SIGKILL)
    assert kills > 2
    assert contents(recipe.data.path) == contents(tmp_path / "undisturbed")
