"""From documents to encoded shards: tokenizers trained or loaded, then every source encoded.

    sources → texts → BPE ─┐
            → images → codec ─┴→ vocabulary → shards/SOURCE

Each part is written whole or not at all and is not made again, so that an interrupted preparation
goes on where it was. Documents that cannot be used are set aside in `rejected.jsonl`.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from moma.data.batches.budget import Budget
from moma.data.batches.iterator import warn_unused_images
from moma.data.config import DataConfig, PrepareConfig
from moma.data.encode.parts import copy_rejected
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.source import Limits, encode_source
from moma.data.encode.tokenizers import encoders_of, provide_tokenizers
from moma.data.encode.training_documents import TrainingDocuments
from moma.data.shards import REJECTED_FILE, ShardInfo, sum_counts
from moma.files import atomic_open, lock_folder
from moma.images import square_pixels
from moma.progress import ProgressCallback, show_progress
from moma.runs import Tokenizers
from moma.runtime.allocator import keep_freed_memory
from moma.tokenizers.image.codec import CodecConfig, ImageCodec, to_float
from moma.tokenizers.text import TextTokenizerConfig, encode_each, load_text_tokenizer
from moma.vocabulary import Vocabulary

# Seconds to wait for another process that prepares the same folder.
PATIENCE = 10.0


@dataclass(frozen=True)
class Prepared:
    """What a data folder holds.

    Attributes:
        vocabulary: the ids.
        sources: what the shards of each source hold.
    """

    vocabulary: Vocabulary
    sources: dict[str, ShardInfo]

    def summary(self) -> dict[str, Any]:
        """Documents, tokens, images and rejected rows, in all and of each source, for JSON."""
        infos = self.sources.values()
        return {
            **sum_counts(info.total for info in infos).model_dump(),
            "rejected": sum(info.rejected for info in infos),
            "held_out": sum_counts(info.counts["held_out"] for info in infos).model_dump(),
            "sources": {name: _summary(info) for name, info in self.sources.items()},
        }


def _summary(info: ShardInfo) -> dict[str, Any]:
    held_out = {"held_out": info.counts["held_out"].model_dump()}
    return {**info.total.model_dump(), "rejected": info.rejected, **held_out}


def prepare(
    config: PrepareConfig,
    device: torch.device,
    quiet: bool = False,
    workers: int | None = None,
) -> Prepared:
    """Make `data.path` ready for training: tokenizer, codec and shards.

    Args:
        config: a recipe, or the part of it that is prepared.
        device: where the codec is trained and run.
        quiet: whether to show no progress.
        workers: most processes that read images; left out, as the processor has cores to spare.
            It changes nothing of what is written.

    Raises:
        UserError: the recipe's image share is impossible, too many rows of a source cannot be
            used, the folder was prepared with other settings, or another process is at work there.
    """
    keep_freed_memory(device)
    data = config.data
    folder = Tokenizers(data.path)
    _check_budget(data, folder, config.text_tokenizer, config.codec)
    folder.path.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder.path, PATIENCE):
        reading = TrainingDocuments(data)
        vocabulary = provide_tokenizers(
            reading,
            config.text_tokenizer,
            config.codec,
            config.codec_training,
            config.seed,
            device,
            quiet,
        )
        reading.warn_changes()
        infos = _encode_all(reading, folder, vocabulary, device, quiet, workers)
    if not data.image_share:
        warn_unused_images(data, vocabulary)
    return Prepared(vocabulary, infos)


def encode_images(
    codec: ImageCodec, device: torch.device, pixels: Sequence[np.ndarray]
) -> np.ndarray:
    """Codes of images of the codec's size, int64 of shape [images, codes_per_image].

    Args:
        codec: on `device`.
        device: of the codec.
        pixels: of each image, uint8 of shape [H, W, 3].
    """
    pixels_BHW3 = torch.from_numpy(np.stack(pixels)).to(device)
    return codec.encode(to_float(pixels_BHW3)).cpu().numpy()


def _check_budget(
    data: DataConfig, folder: Tokenizers, text: TextTokenizerConfig, codec: CodecConfig
) -> None:
    """Refuse an image share that no micro-batch can hold before any work is done."""
    known = [folder, *([Tokenizers(data.tokenizers)] if data.tokenizers else [])]
    made = next((one.vocabulary for one in known if one.vocabulary.exists()), None)
    vocabulary = Vocabulary.load(made) if made else _outline(text, codec)
    Budget.of(data, vocabulary)


def _outline(text: TextTokenizerConfig, codec: CodecConfig) -> Vocabulary:
    """The sizes of a vocabulary that is still to be made; its ids mean nothing."""
    return Vocabulary(
        size=text.vocabulary_size,
        beginning=0,
        end=1,
        padding=2,
        begin_image=3,
        end_image=4,
        image_codes=(),
        codes_per_image=codec.codes_per_image,
    )


def _encode_all(
    sources: TrainingDocuments,
    folder: Tokenizers,
    vocabulary: Vocabulary,
    device: torch.device,
    quiet: bool,
    workers: int | None,
) -> dict[str, ShardInfo]:
    """Encode every source; `rejected.jsonl` names the rows of all that were set aside."""
    tokenizer = load_text_tokenizer(folder.text)
    codec = ImageCodec.load(folder.codec).to(device) if folder.codec.exists() else None
    encoders = encoders_of(folder)
    encoders.save(folder.path)
    data = sources.data
    limits = Limits(shard_tokens=data.shard_tokens, max_rejected=data.max_rejected)
    size = codec.config.image_size if codec else 1
    infos: dict[str, ShardInfo] = {}
    try:
        with ImageReader(
            partial(square_pixels, size=size), spare_cores() if workers is None else workers
        ) as reader:
            for source in data.sources:
                total = None if quiet else sources.total(source)
                with show_progress(f"encode {source.name}", total, quiet) as report:
                    infos[source.name] = encode_source(
                        source,
                        partial(encode_each, tokenizer),
                        partial(encode_images, codec, device) if codec else None,
                        vocabulary,
                        sources.held_out(source),
                        data.folder(source.name),
                        encoders=encoders,
                        limits=limits,
                        reader=reader,
                        codec_apart=device.type != "cpu",
                        progress=Speed(report),
                    )
    finally:
        _collect_rejected(data)
    return infos


class Speed:
    """Reports how much has been encoded, and how fast."""

    def __init__(self, report: ProgressCallback) -> None:
        self._report = report
        self._start: ShardInfo | None = None
        self._began = time.monotonic()

    def __call__(self, info: ShardInfo) -> None:
        """Report rows done, and documents, tokens and images a second since the first call."""
        self._start = self._start or info
        seconds = max(time.monotonic() - self._began, 1e-9)
        done, before = info.total.model_dump(), self._start.total.model_dump()
        rates = [f"{(done[key] - before[key]) / seconds:,.0f} {key}/s" for key in done]
        rejected = [f"{info.rejected} rejected"] if info.rejected else []
        self._report(info.rows, ", ".join([*rates, *rejected]))


def spare_cores() -> int:
    """Cores that this process may use beside the one that it is on."""
    try:
        return len(os.sched_getaffinity(0)) - 1
    except AttributeError:  # not on every system
        return (os.cpu_count() or 1) - 1


def _collect_rejected(data: DataConfig) -> None:
    """One file for all sources, made anew from what is kept beside the shards of each."""
    with atomic_open(data.path / REJECTED_FILE) as file:
        for source in data.sources:
            copy_rejected(data.folder(source.name), file)
