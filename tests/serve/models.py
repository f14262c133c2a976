"""A tiny model of random weights for the tests of the server."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moma.generate.mixed import MixedModel
from moma.generate.stream import Content
from moma.model.routing import ROUTINGS
from moma.model.transformer import ModelConfig, Transformer
from moma.vocabulary import Vocabulary
from tests.factories import make_tokenizers

CONTEXT = 64


def make_mixed(folder: Path, context: int = CONTEXT) -> MixedModel:
    """A model whose images have 4 codes and 16 × 16 pixels."""
    tokenizers = make_tokenizers(folder, block_channels=[8, 16])
    config = ModelConfig(dim=32, layers=2, heads=2, groups="moe_2t2i")
    model = Transformer(config, Vocabulary.load(tokenizers.vocabulary), (0.5, 0.5))
    model.initialize(0)
    model.causal_routing = ROUTINGS["auxiliary"]
    return MixedModel.assemble(model.eval(), tokenizers, context)


def noise(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def comparable(content: Sequence[Content]) -> list[object]:
    """Content as text and pixel values."""
    return [part if isinstance(part, str) else np.asarray(part).tolist() for part in content]
