"""Session fixtures: a prepared folder and trained runs."""

import os
from pathlib import Path

import pytest
import torch

from moma.data.encode.prepare import prepare
from moma.progress import show_log_messages
from moma.train.recipe import Recipe

pytest.register_assert_rewrite("tests.command_line", "tests.factories")
from tests.command_line import train  # noqa: E402
from tests.factories import tiny_recipe, write_sources  # noqa: E402

show_log_messages()
# Test processes share the cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The tiny recipe, its data prepared once for the whole session."""
    folder = tmp_path_factory.mktemp("tiny")
    write_sources(folder / "sources")
    recipe = tiny_recipe(folder / "sources", folder / "data")
    prepare(recipe, torch.device("cpu"), quiet=True)
    return recipe


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data, a run and its routers; do not modify it."""
    return train(tmp_path_factory.mktemp("trained"))
