"""Small sources, and a tokenizer and codec that need no training, to encode in tests."""

import json
import threading
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image

from moma.data.documents import Document, ImageRef
from moma.data.encode.source import encode_source
from moma.errors import UserError
from moma.recipe import Config
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary(300)


class Numbers(Config):
    """Documents `n0`, `n1`, …; every third has an image, one of two."""

    kind: Literal["numbers"] = "numbers"
    name: str = "numbers"
    weight: float = 1.0
    count: int = 20

    def documents(self):
        for number in range(self.count):
            image = ImageRef(f"p{number}", partial(Image.new, "L", (2, 2), number % 2 * 9))
            segments = (f"n{number}", image, "!") if number % 3 == 0 else (f"n{number}",)
            yield Document(f"doc {number}", segments, held_out=number % 5 == 4)


class Given:
    """A source of given rows; a string becomes a document of that text."""

    name = "given"

    def __init__(self, *rows):
        self.rows = rows

    def documents(self):
        for number, row in enumerate(self.rows):
            yield Document(f"doc {number}", (row,)) if isinstance(row, str) else row


def encode_text(texts):
    return [[30 + byte for byte in text.encode()] for text in texts]


class Codec:
    def __init__(self):
        self.calls, self.threads = [], set()

    def __call__(self, images):
        self.calls.append(len(images))
        self.threads.add(threading.get_ident())
        return np.array([[image[0, 0, 0], 1, 2, 3] for image in images])


def unreadable(reason):
    def read():
        raise UserError(reason)

    return ImageRef("broken", read)


def run(folder, source=None, codec=None, share=0.02, **options):
    return encode_source(
        source or Numbers(), encode_text, codec or Codec(), VOCABULARY, share, folder, **options
    )


def rejected_in(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
