"""What preparing a recipe's data will take, estimated from samples of its parts."""

import time
from collections.abc import Callable
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
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
        `path`, `processes`, `uncut`, the names of the sources that are not cut, and of all sources
        together as of each in `sources`: `parts`, `bytes`, `documents`, `tokens`, `images`, `hours`
        and `cost`. The hours of a source are those that it would take alone; a part takes one
        process. What is not known is None: documents and what follows for a source of one part
        without a size, and the cost without a price.
    """
    encoders = _Encoders(config, device)
    sources = {
        source.name: _estimate_source(source, config, encoders) for source in config.data.sources
    }
    found = [*sources.values()]
    hours = [each.hours(processes, encoders.devices) for each in found]
    whole = _together(found)
    # A source of few parts may take longer than all the work takes if it is divided equally.
    longest = _combine(max, [*hours, whole.hours(processes, encoders.devices)])
    return {
        "path": str(config.data.path),
        "processes": processes,
        "uncut": [name for name, each in sources.items() if each.is_uncut],
        **_with_cost(whole, longest, price),
        "sources": {
            name: _with_cost(each, its, price)
            for (name, each), its in zip(sources.items(), hours, strict=True)
        },
    }


class _Seconds(NamedTuple):
    """Time that it takes of a core, and of a GPU."""

    core: float = 0.0
    gpu: float = 0.0


class _Estimated(NamedTuple):
    """What is expected of one source, or of several.

    Attributes:
        counts: None where it is not known.
        seconds: of one core and of one GPU, None if not known.
        is_uncut: whether it can only be read from the beginning.
    """

    counts: dict[str, Any]
    seconds: _Seconds | None
    is_uncut: bool = False

    def hours(self, cores: int, gpus: int) -> float | None:
        """Return the hours on so many cores and GPUs; each part takes one of them."""
        if self.seconds is None:
            return None
        parts = max(1, self.counts["parts"])
        core, gpu = self.seconds
        return max(core / min(cores, parts), gpu / min(gpus, parts)) / 3600


def _together(found: list[_Estimated]) -> _Estimated:
    counts = {key: _combine(sum, [each.counts[key] for each in found]) for key in found[0].counts}
    seconds = [each.seconds for each in found if each.seconds is not None]
    if len(seconds) < len(found):
        return _Estimated(counts, None)
    core, gpu = (sum(values) for values in zip(*seconds, strict=True))
    return _Estimated(counts, _Seconds(core, gpu))


def _combine(function: Callable[[list[Any]], Any], values: list[Any]) -> Any:
    return None if None in values else function(values)


def _with_cost(found: _Estimated, hours: float | None, price: float | None) -> dict[str, Any]:
    cost = None if hours is None or price is None else hours * price
    return {**found.counts, "hours": hours, "cost": cost}


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
        codec, is_on_core = self._codec, self._device.type == "cpu"
        size = codec.config.image_size
        # The first image that is read, and the first one that is encoded, take longer.
        _read_images(images[:1], size)
        begin = time.monotonic()
        pixels = _read_images(images, size)
        read = time.monotonic() - begin
        if not pixels:
            return _Seconds(read / len(images))
        encode_images(codec, self._device, pixels[:1])
        clock = time.process_time if is_on_core else time.monotonic
        begin = clock()
        encode_images(codec, self._device, pixels)
        encode = clock() - begin
        core, gpu = (read + encode, 0.0) if is_on_core else (read, encode)
        return _Seconds(core / len(images), gpu / len(images))


def _read_images(images: list[ImageRef], size: int) -> list[np.ndarray]:
    pixels = []
    for image in images:
        try:
            pixels.append(square_pixels(image.read(), size))
        except UserError:
            continue  # it will be rejected
    return pixels


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
    source: SourceConfig, config: PrepareConfig, encoders: _Encoders
) -> _Estimated:
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
    is_uncut = parts == [SourcePart()]
    if documents is None:
        return _Estimated({**found, "tokens": None, "images": None}, None, is_uncut)
    of = max(len(sample.documents), 1)
    tokens, text_seconds = encoders.count_tokens(texts)
    step = max(1, len(images) // BATCH_IMAGES)
    of_image = encoders.image_seconds(images[::step][:BATCH_IMAGES])
    core = sample.seconds + (text_seconds + len(images) * of_image.core) / of
    gpu = len(images) * of_image.gpu / of
    counts = {
        **found,
        "tokens": round(documents * (tokens / of + 2 + len(images) / of * encoders.image_span)),
        "images": round(documents * len(images) / of),
    }
    return _Estimated(counts, _Seconds(documents * core, documents * gpu), is_uncut)
