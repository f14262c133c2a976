"""Speed of the data: micro-batches from shards, waiting in training, encoding of images and text.

    prepared shards → `Batches`, prefetched, on one core      → tokens a second, balance, padding
                    → steps of a real model                   → share of the time spent waiting
    images        → `moma prepare`        | the network     → images a second of each
    texts           → documents to shards   | `tokenizers`    → tokens a second of each

What is compared runs in interleaved rounds, of which medians are taken.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from moma.bench.timing import Job, clock_of, interleaved, median_ratio, seconds
from moma.data.batches.iterator import Batches, prefetch
from moma.data.documents import Document, ImageRef
from moma.data.encode.prepare import prepare
from moma.data.encode.source import encode_source
from moma.data.sources.captions import CaptionsConfig
from moma.errors import UserError
from moma.progress import show_progress
from moma.runs import Tokenizers
from moma.runtime.optimizer import make_optimizer
from moma.runtime.world import World, local_device
from moma.tokenizers.image.codec import ImageCodec, preprocess
from moma.tokenizers.text import encode_each, load_text_tokenizer
from moma.train.recipe import Recipe
from moma.train.step import Step, next_token_objective
from moma.vocabulary import IMAGE, Vocabulary

# As many as `moma prepare` encodes at once.
_CODEC_BATCH = 16
_TEXTS_PER_LONG_DOCUMENT = 16


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        batches: micro-batches of each repeat.
        steps: training steps.
        images: images of each repeat; at most as many as the sources have.
        texts: texts of each repeat; likewise.
        repeats: how often each measurement is taken.
        cpu_time: whether `codec_ratio` and `bpe_ratio` compare processor time, which leaves out
            other processes and adds up threads.
    """

    batches: int = 100
    steps: int = 4
    images: int = 48
    texts: int = 10_000
    repeats: int = 5
    cpu_time: bool = False


def bench_data(recipe: Recipe, sizes: Sizes, quiet: bool = False) -> dict[str, Any]:
    """Measure a recipe's data, which is prepared first if it is not yet.

    Returns:
        The figures that `docs/batches.md` lists; None where a recipe has nothing to measure.

    Raises:
        UserError: the data cannot be prepared, or does not suit the recipe.
    """
    data = recipe.data
    prepare(recipe, local_device(), quiet)
    vocabulary = Vocabulary.load(Tokenizers(data.path).vocabulary)
    with show_progress("bench data", 5, quiet) as report:
        result = _balance(recipe, vocabulary, sizes)
        report(1, "balance")
        result |= _speed(recipe, vocabulary, sizes)
        report(2, "batches")
        result |= _waiting(recipe, vocabulary, sizes)
        report(3, "training")
        result |= _images(recipe, sizes)
        report(4, "images")
        result |= _texts(recipe, vocabulary, sizes)
        report(5, "text")
    return result


def _balance(recipe: Recipe, vocabulary: Vocabulary, sizes: Sizes) -> dict[str, Any]:
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
    model = recipe.build_model(vocabulary).to(world.device)
    for router in model.auxiliary_routers():
        router.requires_grad_(False)
    optimizer = recipe.pretrain.optimizer
    objective = next_token_objective(recipe.pretrain.z_loss, compiled=False)
    step = Step(model, make_optimizer(model, optimizer), objective, optimizer.clip, world)
    waits, steps = [], []
    with closing(prefetch(Batches(recipe.data, vocabulary, recipe.seed), recipe.data)) as ahead:
        for _ in range(sizes.steps + 1):
            start = time.perf_counter()
            batch = next(ahead)
            waits.append(time.perf_counter() - start)
            _, norm = step([batch], optimizer.learning_rate)
            float(norm)  # waits for the device
            steps.append(time.perf_counter() - start)
    # The first step includes start-up.
    return {
        "wait_share": sum(waits[1:]) / sum(steps[1:]),
        "step_seconds": statistics.median(steps[1:]),
    }


def _images(recipe: Recipe, sizes: Sizes) -> dict[str, Any]:
    """A folder of captioned images through `moma prepare`, compared with the codec alone.

    The codec's images are already preprocessed and on the device.
    """
    device = local_device()
    with TemporaryDirectory() as place:
        folder = Path(place)
        count = _write_captions(_images_of(recipe, sizes.images), folder / "captions")
        if not count:
            return {"codec_ratio": None}
        codec = ImageCodec.load(Tokenizers(recipe.data.path).codec).to(device)
        files = sorted((folder / "captions").glob("*.png"))
        ready = [_tensor(file, codec, device) for file in files]
        source = CaptionsConfig(path=folder / "captions")
        data = recipe.data.model_copy(
            update={"path": folder / "data", "tokenizers": recipe.data.path, "sources": (source,)}
        )
        copy = recipe.model_copy(update={"data": data})

        def ours() -> None:
            prepare(copy, device, quiet=True)

        def network() -> None:
            for start in range(0, count, _CODEC_BATCH):
                codec.encode(torch.stack(ready[start : start + _CODEC_BATCH])).cpu()

        taken = _compare(ours, network, sizes, lambda: _remove(data.path))
    return {
        "codec_ratio": taken.ratio,
        "images_per_second": count / taken.ours,
        "network_images_per_second": count / taken.reference,
    }


def _texts(recipe: Recipe, vocabulary: Vocabulary, sizes: Sizes) -> dict[str, Any]:
    """Text documents to shards on disk, compared with `encode_batch` and its ids alone.

    Once as they are, and once joined into longer documents.
    """
    texts = list(islice(_texts_of(recipe), sizes.texts))
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
    tokenizer = load_text_tokenizer(Tokenizers(recipe.data.path).text)
    share = recipe.data.held_out
    source = _Listed([Document(str(number), (text,)) for number, text in enumerate(texts)])
    tokens = 0
    with TemporaryDirectory() as place:

        def ours() -> None:
            encode_text = partial(encode_each, tokenizer)
            encode_source(source, encode_text, _no_images, vocabulary, share, Path(place) / "text")

        def reference() -> None:
            nonlocal tokens
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
            tokens = sum(len(encoding.ids) for encoding in encodings)

        taken = _compare(ours, reference, sizes, lambda: _remove(Path(place) / "text"))
    return {
        "bpe_ratio": taken.ratio,
        "text_tokens_per_second": tokens / taken.ours,
        "tokenizers_tokens_per_second": tokens / taken.reference,
    }


@dataclass(frozen=True)
class _Listed:
    """Documents in memory as a source."""

    all: Sequence[Document]
    name: str = "listed"

    def documents(self) -> Iterator[Document]:
        return iter(self.all)


def _no_images(images: Sequence[Any]) -> np.ndarray:
    raise AssertionError("these documents have no images")


def _documents_of(recipe: Recipe) -> Iterator[Document]:
    for source in recipe.data.sources:
        yield from (row for row in source.documents() if isinstance(row, Document))


def _texts_of(recipe: Recipe) -> Iterator[str]:
    for document in _documents_of(recipe):
        if not any(isinstance(segment, ImageRef) for segment in document.segments):
            yield from (segment for segment in document.segments if isinstance(segment, str))


def _images_of(recipe: Recipe, limit: int) -> Iterator[ImageRef]:
    images = (
        segment
        for document in _documents_of(recipe)
        for segment in document.segments
        if isinstance(segment, ImageRef)
    )
    return islice(images, limit)


def _write_captions(images: Iterator[ImageRef], folder: Path) -> int:
    """A folder of PNG files with a caption each, no image twice; returns how many."""
    folder.mkdir()
    seen: set[bytes] = set()
    with (folder / "captions.jsonl").open("w") as rows:
        for image in images:
            try:
                opened = image.read().convert("RGB")
            except UserError:
                continue  # as `moma prepare` does
            if opened.tobytes() not in seen:
                seen.add(opened.tobytes())
                name = f"{len(seen):06}.png"
                opened.save(folder / name)
                rows.write(f'{{"image": "{name}", "caption": "image {len(seen)}"}}\n')
    return len(seen)


def _tensor(file: Path, codec: ImageCodec, device: torch.device) -> torch.Tensor:
    from PIL import Image

    with Image.open(file) as image:
        return preprocess(image, codec.config.image_size).to(device)


class _Compared(NamedTuple):
    """Median seconds of `moma`'s way and of the reference, and the median ratio of the latter."""

    ours: float
    reference: float
    ratio: float


def _compare(ours: Job, reference: Job, sizes: Sizes, clean_up: Callable[[], None]) -> _Compared:
    """Time both in interleaved rounds; the first round is not counted."""
    timed = [partial(seconds, job, clock_of(sizes.cpu_time)) for job in (ours, reference)]
    rounds = interleaved(timed, sizes.repeats + 1, lambda done: clean_up())
    own, other = (taken[1:] for taken in rounds)
    return _Compared(statistics.median(own), statistics.median(other), median_ratio(other, own))


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


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
