"""A small world on disk: captioned images and text, prepared by the real thing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moma.data.encode.prepare import prepare
from moma.recipe import check
from moma.train.recipe import Recipe

pytest.register_assert_rewrite("tests.command_line")
from tests.command_line import train  # noqa: E402

# Several test processes share few cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}


def write_sources(folder: Path) -> None:
    """Coloured squares with captions, and plain sentences."""
    folder.mkdir(parents=True)
    rows, random = [], np.random.default_rng(0)
    for index in range(24):
        name = list(COLOURS)[index % len(COLOURS)]
        pixels = np.full((16, 16, 3), 255, dtype=np.uint8)
        left, top = random.integers(0, 8, 2)
        pixels[top : top + 8, left : left + 8] = COLOURS[name]
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "caption": f"a {name} square"}))
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")
    words = ["square", "paper", "colour", "of", "the", "on", "is", "red", "green", "blue"]
    sentences = [" ".join(random.choice(words, 12)) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(sentences) + "\n")


def tiny_recipe(sources: Path, data: Path, **changes) -> Recipe:
    """A recipe of seconds: 16 × 16 images of 16 codes, two layers of width 16."""
    values = {
        "run": str(data.parent / "run"),
        "text_tokenizer": {"vocabulary_size": 320},
        "codec": {
            "image_size": 16,
            "patch": 4,
            "block_channels": [8],
            "layers_per_block": 1,
            "latent_channels": 8,
            "code_channels": 8,
            "codebook_size": 32,
            "encoder_middle": False,
            "middle_attention": False,
            "norm_groups": 4,
        },
        "codec_training": {"steps": 4, "batch_size": 8},
        "data": {
            "path": str(data),
            "micro_batch_size": 2,
            "sequence_length": 64,
            "image_share": 0.25,
            "held_out": 0.2,
            "sources": [
                {"kind": "captions", "path": str(sources)},
                {"kind": "text", "path": str(sources / "text.txt")},
            ],
        },
        "model": {"groups": "moe_2t2i", "dim": 16, "layers": 2, "heads": 2},
        "pretrain": {
            "steps": 8,
            "log_every": 2,
            "checkpoint_every": 4,
            "compile": False,
            "optimizer": {"learning_rate": 1e-2, "warmup": 2},
        },
        "aux_router": {
            "steps": 6,
            "log_every": 2,
            "checkpoint_every": 2,
            "compile": False,
            "optimizer": {"learning_rate": 1e-2, "warmup": 2},
        },
    }
    recipe = check(Recipe, values, "tiny")
    return recipe.model_copy(update=changes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The tiny recipe, its data prepared once for the whole session."""
    folder = tmp_path_factory.mktemp("tiny")
    write_sources(folder / "sources")
    recipe = tiny_recipe(folder / "sources", folder / "data")
    prepare(
        recipe.data,
        recipe.text_tokenizer,
        recipe.codec,
        recipe.codec_training,
        recipe.seed,
        torch.device("cpu"),
        quiet=True,
    )
    return recipe


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder in which everything was prepared and trained; not to be changed."""
    return train(tmp_path_factory.mktemp("trained"))
