"""A small recipe of captioned images and text, to prepare in tests."""

import json
import random
from pathlib import Path

import torch
from PIL import Image

from moma.data.encode.prepare import prepare
from moma.recipe import check
from moma.train.recipe import Recipe
from tests.factories import CODEC

WORDS = ["red", "green", "rocket", "left", "of", "an", "apple", "schön"]


def make_recipe(folder: Path, rows: int, data: str = "data", **changes) -> Recipe:
    """Captioned images, one in forty of them unreadable, and a text."""
    images = folder / "images"
    if not images.exists():
        images.mkdir(parents=True)
        draw = random.Random(0)
        lines = []
        for number in range(rows):
            if number % 40 == 7:
                (images / f"{number}.png").write_bytes(b"no image")
            else:
                colour = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
                Image.new("RGB", (20, 16), colour).save(images / f"{number}.png")
            caption = " ".join(draw.choices(WORDS, k=4))
            lines.append(json.dumps({"image": f"{number}.png", "caption": caption}))
        (images / "captions.jsonl").write_text("\n".join(lines) + "\n")
        paragraphs = [" ".join(draw.choices(WORDS, k=12)) for _ in range(rows)]
        (folder / "words.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    sources = [
        {"kind": "captions", "path": str(images)},
        {"kind": "text", "path": str(folder / "words.txt")},
    ]
    values = {
        "seed": 3,
        "text_tokenizer": {"vocabulary_size": 300},
        "codec": CODEC,
        "codec_training": {
            "steps": 4,
            "batch_size": 4,
            "warmup_steps": 1,
            "quantizer_start_step": 2,
        },
        "data": {
            "path": str(folder / data),
            "micro_batch_size": 2,
            "sequence_length": 64,
            "image_share": 0.25,
            "held_out": 0.2,
            "max_rejected": 0.05,
            "sources": sources,
            **changes,
        },
    }
    return check(Recipe, values, "test")


def run(recipe: Recipe, quiet: bool = True, **options):
    return prepare(recipe, torch.device("cpu"), quiet=quiet, **options)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
