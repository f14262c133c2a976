"""A folder of Chameleon's port, and a copy to break."""

import shutil
from pathlib import Path

import pytest

from tests.hub.chameleon_port import random_port, save


@pytest.fixture(scope="package")
def saved(tmp_path_factory) -> Path:
    """A folder of the port; not to be changed."""
    return save(random_port(), tmp_path_factory.mktemp("port") / "chameleon")


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy of the folder, to be changed."""
    shutil.copytree(saved, tmp_path / "broken")
    return tmp_path / "broken"
