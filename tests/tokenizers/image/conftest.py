"""Weights for the perceptual loss."""

from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.hub.foreign import random_vgg


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(random_vgg(), file)
    return file
