"""What preparing a recipe's data will take, estimated from samples of its parts."""

import time
from functools import cached_property
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
from moma.data.encode.executors import local_devices
from moma.data.encode.tokens import BATCH_IMAGES
from moma.data.encode.worker import encode_images
from moma.errors import UserError
from moma.images import square_pixels
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec
from moma.tokenizers.text import encode_texts, load_text_tokenizer, train_text_tokenizer

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
        processes: that encode at the same time, each on a core like these; images on all GPUs.
        price: of an hour of all of them together.

    Returns:
        `path`, `processes`, and of all sources together as of each in `sources`: `parts`, `bytes`,
        `documents`, `tokens`, `images`, `hours` and `cost`. What is not known is None: documents
        and what follows for a source of one part without a size, and the cost without a price.
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


class _Seconds(NamedTuple):
    """Time that an image takes of a core, and of a GPU."""

    core: float = 0.0
    gpu: float = 0.0


class _Encoders:
    """The tokenizer and the codec that exist, or others as fast as those that will be trained."""

    def __init__(self, config: PrepareConfig, device: torch.device) -> None:
        data = config.data
        folders = (Tokenizers(path) for path in (data.path, data.tokenizers) if path is not None)
        self._folder = next((each for each in folders if each.text.exists()), None)
        self._tokenizer = load_text_tokenizer(self._folder.text) if self._folder else None
        self._config, self._device = config, device
        self.image_span = config.codec.codes_per_image + 2
        self.devices = len(local_devices(device))

    @cached_property
    def _codec(self) -> ImageCodec:
        if self._folder is not None and self._folder.codec.exists():
            return ImageCodec.load(self._folder.codec).to(self._device)
        return ImageCodec(self._config.codec).eval().to(self._device)

    def count_tokens(self, texts: list[str]) -> tuple[float, float]:
        """Return the tokens of texts, or about how many there will be, and a core's seconds."""
        texts = [text.encode(errors="ignore").decode() for text in texts]
        if not texts:
            return 0.0, 0.0
        codes = self._config.codec.codebook_size
        tokenizer = self._tokenizer or train_text_tokenizer(
            self._config.text_tokenizer, texts, codes
        )
        begin = time.process_time()  # of all threads
        tokens: float = sum(len(ids) for ids in encode_texts(tokenizer, texts))
        seconds = time.process_time() - begin
        if self._tokenizer is None:  # this one has seen what it counts
            tokens = sum(map(len, texts)) / _CHARACTERS_PER_TOKEN
        return tokens, seconds

    def image_seconds(self, images: list[ImageRef]) -> _Seconds:
        """Return the time to read and encode an image."""
        if not images:
            return _Seconds()
        codec, pixels, begin = self._codec, [], time.monotonic()
        for image in images:
            try:
                pixels.append(square_pixels(image.read(), codec.config.image_size))
            except UserError:
                continue  # it will be rejected
        read, is_on_core = time.monotonic() - begin, self._device.type == "cpu"
        if not pixels:
            return _Seconds(read / len(images))
        if not is_on_core:  # the first call takes longer
            encode_images(codec, self._device, pixels)
        clock = time.process_time if is_on_core else time.monotonic
        begin = clock()
        encode_images(codec, self._device, pixels)
        encode = clock() - begin
        core, gpu = (read + encode, 0.0) if is_on_core else (read, encode)
        return _Seconds(core / len(images), gpu / len(images))


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
    documents = sample.rows
    if sample.rows is not None and sample.size:
        documents = round(sample.rows * size / sample.size)
    found = {"parts": len(parts), "bytes": size, "documents": documents}
    if documents is None:
        return {**found, **dict.fromkeys(("tokens", "images", "hours", "cost"))}
    of = max(len(sample.documents), 1)
    tokens, text_seconds = encoders.count_tokens(texts)
    step = max(1, len(images) // BATCH_IMAGES)
    of_image = encoders.image_seconds(images[::step][:BATCH_IMAGES])
    core = sample.seconds + (text_seconds + len(images) * of_image.core) / of
    gpu = len(images) * of_image.gpu / of
    cores, gpus = (processes, encoders.devices) if size else (1, 1)  # a single part without a size
    hours = documents * max(core / cores, gpu / gpus) / 3600
    return {
        **found,
        "tokens": round(documents * (tokens / of + 2 + len(images) / of * encoders.image_span)),
        "images": round(documents * len(images) / of),
        "hours": hours,
        "cost": None if price is None else hours * price,
    }
