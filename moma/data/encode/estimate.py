"""What preparing a recipe's data will take, estimated from samples of its parts."""

import time
from itertools import islice
from typing import Any, NamedTuple

import torch

from moma.data.config import PrepareConfig
from moma.data.documents import (
    Document,
    ImageRef,
    SourceConfig,
    SourcePart,
)
from moma.data.encode.tokens import BATCH_IMAGES
from moma.data.encode.worker import encode_images
from moma.errors import UserError
from moma.images import square_pixels
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec
from moma.tokenizers.text import encode_texts, load_text_tokenizer

# What is read of each source.
SAMPLE_BYTES, SAMPLED_PARTS, SAMPLED_DOCUMENTS = 2**20, 4, 200
MAX_ROWS = 100_000
# Until there is a tokenizer: of English text.
_CHARACTERS_PER_TOKEN = 4.0


def estimate(
    config: PrepareConfig, device: torch.device, processes: int, price: float | None
) -> dict[str, Any]:
    """Estimate documents, tokens, hours and cost of preparing data; nothing is written.

    Args:
        processes: that encode at the same time, each as fast as this one.
        price: of an hour of all of them together.

    Returns:
        `path`, `processes`, and of all sources together as of each in `sources`: `parts`, `bytes`,
        `documents`, `tokens`, `images`, `hours` and `cost`. What is not known is None: documents
        and what follows for a source of one part without a size, hours of images without a codec.
    """
    encoders = _Encoders(config, device)
    sources = {
        source.name: _estimate_source(source, config, encoders, processes, price)
        for source in config.data.sources
    }
    keys = ("parts", "bytes", "documents", "tokens", "images", "hours", "cost")
    found = {key: [counts[key] for counts in sources.values()] for key in keys}
    return {
        "path": str(config.data.path),
        "processes": processes,
        **{key: None if None in values else sum(values) for key, values in found.items()},
        "sources": sources,
    }


class _Encoders:
    """The tokenizer and the codec that exist, and the time that they take."""

    def __init__(self, config: PrepareConfig, device: torch.device) -> None:
        data = config.data
        folders = (Tokenizers(path) for path in (data.path, data.tokenizers) if path is not None)
        folder = next((each for each in folders if each.text.exists()), None)
        self._tokenizer = load_text_tokenizer(folder.text) if folder else None
        has_codec = folder is not None and folder.codec.exists()
        self._codec = ImageCodec.load(folder.codec).to(device) if folder and has_codec else None
        self._device = device
        self.image_span = config.codec.codes_per_image + 2

    def count_tokens(self, texts: list[str]) -> float:
        """Return the tokens of texts, or about how many there will be."""
        if self._tokenizer is None:
            return sum(map(len, texts)) / _CHARACTERS_PER_TOKEN
        return sum(len(ids) for ids in encode_texts(self._tokenizer, texts))

    def image_seconds(self, images: list[ImageRef]) -> float | None:
        """Return the time of reading and encoding an image; None without a codec."""
        if self._codec is None:
            return None
        begin, pixels = time.monotonic(), []
        for image in images:
            try:
                pixels.append(square_pixels(image.read(), self._codec.config.image_size))
            except UserError:
                continue  # it will be rejected
        if not pixels:
            return 0.0
        encode_images(self._codec, self._device, pixels)
        return (time.monotonic() - begin) / len(images)


class _Sample(NamedTuple):
    """What was read of a source.

    Attributes:
        rows: number of rows, rejected ones included; None if there are too many to count.
        size: bytes of the parts that they are in.
        seconds: time to read a row.
        documents: some of the rows.
    """

    rows: int | None
    size: int
    seconds: float
    documents: list[Document]


def _sample(source: SourceConfig, parts: list[SourcePart]) -> _Sample:
    step = max(1, len(parts) // SAMPLED_PARTS)
    chosen = parts[step // 2 :: step][:SAMPLED_PARTS]
    begin, count, documents = time.monotonic(), 0, list[Document]()
    for part in chosen:
        for number, row in enumerate(islice(source.read_part(part), MAX_ROWS + 1)):
            count += 1
            if number == MAX_ROWS:
                seconds = (time.monotonic() - begin) / count
                return _Sample(None, 0, seconds, documents)
            if number < SAMPLED_DOCUMENTS and isinstance(row, Document):
                documents.append(row)
    seconds = (time.monotonic() - begin) / max(count, 1)
    return _Sample(count, sum(part.size for part in chosen), seconds, documents)


def _estimate_source(
    source: SourceConfig,
    config: PrepareConfig,
    encoders: _Encoders,
    processes: int,
    price: float | None,
) -> dict[str, Any]:
    parts = source.parts(config.data.part_bytes)
    size = sum(part.size for part in parts)
    sample = _sample(source, source.parts(min(SAMPLE_BYTES, config.data.part_bytes)))
    segments = [segment for document in sample.documents for segment in document.segments]
    texts = [segment for segment in segments if isinstance(segment, str)]
    images = [segment for segment in segments if isinstance(segment, ImageRef)]
    begin = time.monotonic()
    tokens = encoders.count_tokens(texts)
    text_seconds, of = time.monotonic() - begin, max(len(sample.documents), 1)
    image_seconds = encoders.image_seconds(images[:: max(1, len(images) // BATCH_IMAGES)])
    documents = sample.rows
    if sample.rows is not None and sample.size:
        documents = round(sample.rows * size / sample.size)
    found = {"parts": len(parts), "bytes": size, "documents": documents}
    if documents is None:
        return {**found, **dict.fromkeys(("tokens", "images", "hours", "cost"))}
    hours = None
    if not images or image_seconds is not None:
        seconds = sample.seconds + (text_seconds + len(images) * (image_seconds or 0.0)) / of
        hours = documents * seconds / processes / 3600
    return {
        **found,
        "tokens": round(documents * (tokens / of + 2 + len(images) / of * encoders.image_span)),
        "images": round(documents * len(images) / of),
        "hours": hours,
        "cost": None if hours is None or price is None else hours * price,
    }
