"""Speed of the data: micro-batches from shards, waiting in training, encoding of images and text.

What is compared runs in interleaved rounds, of which medians are taken.
"""

import os
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from moma.bench.timing import Job, interleaved, median_ratio, seconds
from moma.data.batches.iterator import Batches, prefetch
from moma.data.documents import Document, ImageRef, SourceConfig, SourceName, SourcePart
from moma.data.encode.executors import spare_cores
from moma.data.encode.prepare import prepare
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.source import SourceEncoding
from moma.data.encode.tokens import BATCH_IMAGES, EncodeImages, Encoder
from moma.data.encode.worker import encode_images
from moma.errors import UserError
from moma.images import square_pixels
from moma.progress import show_progress
from moma.runs import Tokenizers
from moma.runtime.world import World, local_device
from moma.tokenizers.image.codec import ImageCodec, preprocess
from moma.tokenizers.text import encode_texts, load_text_tokenizer
from moma.train.recipe import Recipe
from moma.train.stages import make_step, prepare_model
from moma.vocabulary import IMAGE, Vocabulary

_TEXTS_PER_LONG_DOCUMENT = 16


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        batches: micro-batches of each repeat.
        steps: training steps.
        images: images of each repeat; at most as many as the sources have.
        texts: texts of each repeat; at most as many as the sources have.
        repeats: how often each measurement is taken.
        cpu_time: whether `codec_ratio` and `bpe_ratio` compare processor time, which leaves out
            other processes and adds up threads.
    """

    batches: int = 100
    steps: int = 2
    images: int = 32
    texts: int = 30_000
    repeats: int = 5
    cpu_time: bool = False


def bench_data(recipe: Recipe, sizes: Sizes, quiet: bool = False) -> dict[str, Any]:
    """Measure a recipe's data, which is prepared first if it is not yet.

    Returns:
        The figures that `docs/batches.md` lists; None where a recipe has nothing to measure.

    Raises:
        UserError: the data cannot be prepared, or does not suit the recipe.
    """
    prepare(recipe, local_device(), quiet)
    vocabulary = Vocabulary.load(Tokenizers(recipe.data.path).vocabulary)
    with show_progress("bench data", 5, quiet) as report:
        result = measure_balance(recipe, vocabulary, sizes)
        report(1, "balance")
        result |= _speed(recipe, vocabulary, sizes)
        report(2, "batches")
        result |= _waiting(recipe, vocabulary, sizes)
        report(3, "training")
        result |= _images(recipe, vocabulary, sizes)
        report(4, "images")
        result |= _texts(recipe, vocabulary, sizes)
        report(5, "text")
    return result


def measure_balance(recipe: Recipe, vocabulary: Vocabulary, sizes: Sizes) -> dict[str, Any]:
    """Count what is in the arrays of micro-batches, independently of the packer."""
    data, size = recipe.data, recipe.data.micro_batch_size * recipe.data.sequence_length
    padding, worst = 0, 0.0
    with closing(prefetch(Batches(data, vocabulary, recipe.seed), data)) as batches:
        for batch in islice(batches, sizes.batches):
            codes = int((vocabulary.modality_of_id[batch.tokens_BS] == IMAGE).sum())
            worst = max(worst, abs(codes / size - data.image_share))
            padding += int((batch.tokens_BS == vocabulary.padding).sum())
    return {
        "micro_batch_size": data.micro_batch_size,
        "sequence_length": data.sequence_length,
        "image_share": data.image_share,
        "padding_share": padding / (sizes.batches * size),
        # A share such as 0.3333 stands for a third.
        "image_share_error": 0.0 if worst < 1e-3 / size else worst,
    }


def _speed(recipe: Recipe, vocabulary: Vocabulary, sizes: Sizes) -> dict[str, Any]:
    data = recipe.data
    tokens = sizes.batches * data.micro_batch_size * data.sequence_length

    def take(batches: Iterator[Any]) -> float:
        return tokens / seconds(lambda: [next(batches) for _ in range(sizes.batches)])

    # The prefetching thread starts inside, so it is on the same core.
    with (
        _one_core(),
        closing(prefetch(Batches(data, vocabulary, recipe.seed), data)) as batches,
    ):
        next(batches)
        found = [take(batches) for _ in range(sizes.repeats)]
    return {"tokens_per_second": statistics.median(found), "slowest_tokens_per_second": min(found)}


def _waiting(recipe: Recipe, vocabulary: Vocabulary, sizes: Sizes) -> dict[str, Any]:
    """Train the recipe's model for some steps; time each step and its wait for the micro-batch."""
    world = World(local_device())
    trained = recipe.model_copy(update={"stage": "pretrain", "from_": None}).without_compilation()
    step = make_step(trained, prepare_model(trained, vocabulary, world), world)
    waits, steps = [], []
    with closing(prefetch(Batches(recipe.data, vocabulary, recipe.seed), recipe.data)) as ahead:
        for _ in range(sizes.steps + 1):
            start = time.perf_counter()
            batch = next(ahead)
            waits.append(time.perf_counter() - start)
            _, norm = step([batch], recipe.pretrain.optimizer.learning_rate)
            float(norm)  # waits for the device
            steps.append(time.perf_counter() - start)
    # The first step includes start-up.
    return {
        "wait_share": sum(waits[1:]) / sum(steps[1:]),
        "step_seconds": statistics.median(steps[1:]),
    }


def _images(recipe: Recipe, vocabulary: Vocabulary, sizes: Sizes) -> dict[str, Any]:
    """Encode documents of a caption and an image to shards; compare with only the codec.

    The images that the codec gets are already preprocessed and on the device.
    """
    device, tokenizers = local_device(), Tokenizers(recipe.data.path)
    images = distinct_images(documents_of(recipe), sizes.images)
    if not images:
        return {"codec_ratio": None}
    codec = ImageCodec.load(tokenizers.codec).to(device)
    size = codec.config.image_size
    ready = [preprocess(image.read(), size).to(device) for image in images]
    documents = [Document(image.name, (f"image {image.name}", image)) for image in images]
    workers = ImageReader(partial(square_pixels, size=size), spare_cores())

    def network() -> None:
        for start in range(0, len(ready), BATCH_IMAGES):
            codec.encode(torch.stack(ready[start : start + BATCH_IMAGES])).cpu()

    with workers as reader:
        encode = partial(encode_images, codec, device)
        taken = _compare_encoding(recipe, vocabulary, documents, encode, reader, network, sizes)
    return {
        "codec_ratio": taken.ratio,
        "images_per_second": len(images) / taken.ours,
        "network_images_per_second": len(images) / taken.reference,
    }


def _texts(recipe: Recipe, vocabulary: Vocabulary, sizes: Sizes) -> dict[str, Any]:
    """Encode text documents, as they are and joined into longer ones."""
    segments = (
        document.segments
        for document in documents_of(recipe)
        if not any(isinstance(segment, ImageRef) for segment in document.segments)
    )
    texts = [str(text) for text in islice(chain.from_iterable(segments), sizes.texts)]
    if not texts:
        return {"bpe_ratio": None}
    longer = [
        "\n".join(texts[start : start + _TEXTS_PER_LONG_DOCUMENT])
        for start in range(0, len(texts), _TEXTS_PER_LONG_DOCUMENT)
    ]
    of_longer = _encoding(recipe, vocabulary, sizes, longer)
    return {
        **_encoding(recipe, vocabulary, sizes, texts),
        "longer_bpe_ratio": of_longer["bpe_ratio"],
    }


def _encoding(
    recipe: Recipe, vocabulary: Vocabulary, sizes: Sizes, texts: Sequence[str]
) -> dict[str, Any]:
    """Encode texts to shards; compare with `encode_batch` of the tokenizer."""
    tokenizer = load_text_tokenizer(Tokenizers(recipe.data.path).text)
    documents = [Document(str(number), (text,)) for number, text in enumerate(texts)]
    tokens = 0

    def reference() -> None:
        nonlocal tokens
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        tokens = sum(len(encoding.ids) for encoding in encodings)

    reader = ImageReader(np.asarray, workers=0)  # of no image
    taken = _compare_encoding(recipe, vocabulary, documents, None, reader, reference, sizes)
    return {
        "bpe_ratio": taken.ratio,
        "text_tokens_per_second": tokens / taken.ours,
        "tokenizers_tokens_per_second": tokens / taken.reference,
    }


class _Listed(SourceConfig):
    """Documents in memory as a source."""

    name: SourceName = "listed"
    rows: tuple[Any, ...] = Field(exclude=True)

    def documents(self) -> Iterator[Document]:
        return iter(self.rows)


def documents_of(recipe: Recipe) -> Iterator[Document]:
    """Yield the documents of all sources that are not rejected."""
    for source in recipe.data.sources:
        yield from (row for row in source.documents() if isinstance(row, Document))


def distinct_images(documents: Iterable[Document], limit: int) -> list[ImageRef]:
    """Return the first images as PNG files in memory, without repetitions and unreadable ones."""
    found: dict[bytes, ImageRef] = {}
    segments = chain.from_iterable(document.segments for document in documents)
    for image in islice((one for one in segments if isinstance(one, ImageRef)), limit):
        try:
            opened = image.read().convert("RGB")
        except UserError:
            continue  # as `moma prepare` does
        buffer = BytesIO()
        opened.save(buffer, format="PNG")
        name, data = str(len(found)), buffer.getvalue()
        found.setdefault(data, ImageRef(name, partial(_read_png, data)))
    return [*found.values()]


def _read_png(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


class _Compared(NamedTuple):
    """Median seconds of `moma` and of the reference, and the median of their ratios by round."""

    ours: float
    reference: float
    ratio: float


def _compare_encoding(
    recipe: Recipe,
    vocabulary: Vocabulary,
    documents: Sequence[Document],
    encode_images: EncodeImages | None,
    reader: ImageReader,
    reference: Job,
    sizes: Sizes,
) -> _Compared:
    """Time the encoding of documents to shards and a reference in interleaved rounds."""
    encode_text = partial(encode_texts, load_text_tokenizer(Tokenizers(recipe.data.path).text))
    source, in_thread = _Listed(rows=tuple(documents)), local_device().type != "cpu"
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "shards"
        encoding = SourceEncoding(source, vocabulary, recipe.data.held_out, folder)

        def ours() -> None:
            shards = encoding.begin()
            with Encoder(encode_text, encode_images, vocabulary, in_thread) as encoder:
                records = encoding.encode_part(0, SourcePart(), encoder, reader)
            encoding.add(shards, 0, records)
            encoding.finish(shards)

        timed = [partial(seconds, job, sizes.cpu_time) for job in (ours, reference)]
        rounds = interleaved(timed, sizes.repeats + 1, lambda done: shutil.rmtree(folder))
    # The first round includes start-up.
    own, other = (taken[1:] for taken in rounds)
    return _Compared(statistics.median(own), statistics.median(other), median_ratio(other, own))


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this thread and those it starts on one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
