"""Small sources, and a tokenizer and codec that need no training, to encode in tests."""

import json
import threading
from functools import partial

import datasets
import numpy as np
from PIL import Image

from moma.data.documents import Document, ImageRef, SourceConfig
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.source import SourceEncoding
from moma.data.encode.tokens import Encoder
from moma.errors import UserError
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary(300)


class Numbers(SourceConfig):
    """Documents `n0`, `n1`, …; every third has an image, one of two."""

    name: str = "numbers"
    count: int = 20

    def documents(self):
        for number in range(self.count):
            image = ImageRef(f"p{number}", partial(Image.new, "L", (2, 2), number % 2 * 9))
            segments = (f"n{number}", image, "!") if number % 3 == 0 else (f"n{number}",)
            yield Document(f"doc {number}", segments, held_out=number % 5 == 4)


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


def encode_source(
    source,
    encode_text,
    encode_images,
    vocabulary,
    held_out_share,
    folder,
    *,
    reader=None,
    codec_in_thread=True,
    split_text=lambda text: [text],
    progress=lambda part: None,
    **options,
):
    """Encode the parts of a source that are not encoded yet, in this process and in order.

    `reader` reads the images, by default in this process; `progress` is called with what has been
    encoded so far; `options` are fields of `SourceEncoding`.
    """
    encoding = SourceEncoding(source, vocabulary, held_out_share, folder, **options)
    if (info := encoding.find_complete()) is not None:
        return info
    shards = encoding.begin()
    reader = reader or ImageReader(to_rgb, workers=0)
    with Encoder(encode_text, encode_images, vocabulary, codec_in_thread, split_text) as encoder:
        for number in shards.pending:
            report = partial(_report, progress, shards.complete)
            part = shards.plan[number]
            encoding.add(
                shards, number, encoding.encode_part(number, part, encoder, reader, report)
            )
    return encoding.finish(shards)


def _report(progress, before, part):
    progress(before + part)


def to_rgb(image):
    """Return the pixels of an image of any size, uint8 of shape [H, W, 3]."""
    return np.asarray(image.convert("RGB"))


def run(folder, source=None, codec=None, share=0.02, **options):
    return encode_source(
        source or Numbers(), encode_text, codec or Codec(), VOCABULARY, share, folder, **options
    )


def rejected_in(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def stored(folder, split="train"):
    """The rows in the files of a split, as the library `datasets` reads them."""
    files = sorted(folder.glob(f"{split}-*.arrow"))
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
