"""A small recipe of captioned images and text, to prepare in tests."""

import json
import random
from pathlib import Path

import torch
from PIL import Image

from moma.data.encode.prepare import prepare
from moma.recipe import check
from moma.train.recipe import Recipe
from tests.factories import CODEC, values_of_recipe

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
                color = (draw.randrange(256), draw.randrange(256), draw.randrange(256))
                Image.new("RGB", (20, 16), color).save(images / f"{number}.png")
            caption = " ".join(draw.choices(WORDS, k=4))
            lines.append(json.dumps({"image": f"{number}.png", "caption": caption}))
        (images / "captions.jsonl").write_text("\n".join(lines) + "\n")
        paragraphs = [" ".join(draw.choices(WORDS, k=12)) for _ in range(rows)]
        (folder / "words.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    values = values_of_recipe(folder)
    del values["aux_router"], values["model"], values["pretrain"], values["run"]
    values["codec"] = CODEC
    limits = {"held_out": 0.2, "image_share": 0.25, "max_rejected": 0.05}
    values["data"] |= {"path": str(folder / data), **limits, **changes}
    return check(Recipe, values, "test")


def run(recipe: Recipe, quiet: bool = True, **options):
    return prepare(recipe, torch.device("cpu"), quiet=quiet, **options)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
