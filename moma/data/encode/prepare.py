"""From documents to encoded shards: tokenizers trained or copied, then every source encoded.

Each part is written atomically and is not made again, so that an interrupted preparation continues
where it was. Documents that cannot be used are listed in `rejected.jsonl`.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from moma.data.batches.budget import Budget
from moma.data.batches.iterator import Batches
from moma.data.cleaning.clean import Cleaning
from moma.data.cleaning.passes import provide_cleaning
from moma.data.config import PrepareConfig
from moma.data.documents import Source, held_out_share
from moma.data.encode.parts import copy_rejected
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.rejected import all_held_out
from moma.data.encode.source import Limits, encode_source
from moma.data.encode.tokenizers import provide_tokenizers
from moma.data.outputs import CLEANING_FOLDER
from moma.data.provenance import DataFolder
from moma.data.shards import REJECTED_FILE, Part, ShardInfo
from moma.errors import UserError, list_names
from moma.files import atomic_open, lock_folder
from moma.images import square_pixels
from moma.progress import ProgressCallback, show_progress
from moma.runs import Tokenizers
from moma.runtime.allocator import keep_freed_memory
from moma.tokenizers.image.codec import ImageCodec, to_float
from moma.tokenizers.text import encode_texts, load_text_tokenizer, split_text
from moma.vocabulary import Vocabulary

# Seconds to wait for another process that prepares the same folder.
LOCK_TIMEOUT = 10.0
# Seconds to count a source's documents for the progress bar.
MAX_COUNTING_SECONDS = 30.0


@dataclass(frozen=True)
class Prepared:
    """A prepared data folder.

    Attributes:
        vocabulary: the ids.
        sources: origin and counts of each source's shards.
    """

    vocabulary: Vocabulary
    sources: dict[str, ShardInfo]

    def summary(self) -> dict[str, Any]:
        """Count documents, tokens, images, rejected and dropped ones, in total and by source."""
        sources = {name: _summary(info.whole) for name, info in self.sources.items()}
        return {**_summary(_together(self.sources)), "sources": sources}


def _together(infos: dict[str, ShardInfo]) -> Part:
    return sum((info.whole for info in infos.values()), Part())


def _summary(part: Part) -> dict[str, Any]:
    held_out = part.counts["held_out"].model_dump()
    return {
        **part.total.model_dump(),
        "rejected": part.rejected,
        "held_out": held_out,
        "dropped": part.dropped,
        "dropped_images": part.dropped_images,
    }


def prepare(
    config: PrepareConfig,
    device: torch.device,
    quiet: bool = False,
    workers: int | None = None,
) -> Prepared:
    """Write tokenizer, codec and shards into `data.path`.

    Args:
        config: a recipe, or the part of it that is prepared.
        device: where the codec is trained and run.
        workers: maximum processes that read images; by default the number of spare cores. It does
            not change what is written.

    Raises:
        UserError: the recipe's image share is impossible, too many documents of a source cannot
            be used, nothing is left for training, the documents cannot be packed as the recipe
            asks, the folder was prepared with another configuration or has files of the user's in
            the way, or another process is using it.
    """
    keep_freed_memory(device)
    data = config.data
    _check_budget(config)
    data.path.mkdir(parents=True, exist_ok=True)
    with lock_folder(data.path, LOCK_TIMEOUT):
        folder = DataFolder(data)
        cleaning = provide_cleaning(data.sources, data.path / CLEANING_FOLDER, quiet)
        vocabulary = provide_tokenizers(config, folder, device, quiet)
        _warn_changed_sources(folder)
        infos = _encode_all(folder, cleaning, vocabulary, device, quiet, workers)
    counts = _together(infos).counts
    if not counts["train"].documents:
        raise all_held_out(counts["held_out"].documents)
    _check_packing(config, vocabulary)
    return Prepared(vocabulary, infos)


def encode_images(
    codec: ImageCodec, device: torch.device, pixels: Sequence[np.ndarray]
) -> np.ndarray:
    """Encode images of the codec's size to codes, int64 of shape [images, codes_per_image].

    Args:
        pixels: pixels of each image, uint8 of shape [H, W, 3].
    """
    pixels_BHW3 = torch.from_numpy(np.stack(pixels)).to(device)
    return codec.encode(to_float(pixels_BHW3)).cpu().numpy()


def _check_budget(config: PrepareConfig) -> None:
    """Refuse an image share that no micro-batch can have before any work is done."""
    data = config.data
    folders = [Tokenizers(path) for path in (data.path, data.tokenizers) if path is not None]
    existing = next((each.vocabulary for each in folders if each.vocabulary.exists()), None)
    # Of a vocabulary that is still to be made, only the sizes are known; the ids are arbitrary.
    sizes = config.text_tokenizer.vocabulary_size, config.codec.codes_per_image
    outline = Vocabulary(sizes[0], 0, 1, 2, 3, 4, (), sizes[1])
    Budget.from_config(data, Vocabulary.load(existing) if existing else outline)


def _warn_changed_sources(folder: DataFolder) -> None:
    if changed := folder.changed_sources():
        print(
            f"note: added or changed since tokenizer and codec in {folder.data.path} were trained: "
            f"{list_names(changed)}; both are kept, as is right if only some documents were fixed; "
            "to train new ones, choose another data.path; a run keeps the documents it began with: "
            "train on these with another run=…",
            file=sys.stderr,
        )


def _check_packing(config: PrepareConfig, vocabulary: Vocabulary) -> None:
    """Refuse what training would refuse; the shards are kept, and serve other recipes."""
    try:
        Batches(config.data, vocabulary, config.seed).close()
    except UserError as error:
        raise UserError(
            f"{config.data.path}: is prepared, but cannot be trained on with this recipe: {error}"
        ) from error


def _encode_all(
    folder: DataFolder,
    cleaning: Mapping[str, Cleaning],
    vocabulary: Vocabulary,
    device: torch.device,
    quiet: bool,
    workers: int | None,
) -> dict[str, ShardInfo]:
    """Encode every source; `rejected.jsonl` lists the rejected documents of all."""
    data, tokenizers = folder.data, folder.tokenizers
    tokenizer = load_text_tokenizer(tokenizers.text)
    codec = ImageCodec.load(tokenizers.codec).to(device) if tokenizers.codec.exists() else None
    preprocess = partial(square_pixels, size=codec.config.image_size if codec else 1)
    encoders = folder.record_encoders()
    infos: dict[str, ShardInfo] = {}
    try:
        with ImageReader(preprocess, spare_cores() if workers is None else workers) as reader:
            for source in data.sources:
                total = None if quiet else count_documents(source, folder)
                with show_progress(f"encode {source.name}", total, quiet) as report:
                    infos[source.name] = encode_source(
                        source,
                        partial(encode_texts, tokenizer),
                        partial(encode_images, codec, device) if codec else None,
                        vocabulary,
                        held_out_share(source, data.held_out),
                        data.folder(source.name),
                        cleaning=cleaning[source.name],
                        encoders=encoders,
                        limits=Limits(data.shard_tokens, data.max_rejected),
                        reader=reader,
                        codec_in_thread=device.type != "cpu",
                        split_text=partial(split_text, tokenizer),
                        progress=report_speed(report),
                    )
    finally:
        # One file for all sources, from those in the folders of their shards.
        with atomic_open(data.path / REJECTED_FILE) as file:
            for source in data.sources:
                copy_rejected(data.folder(source.name), file)
    return infos


def count_documents(source: Source, folder: DataFolder) -> int | None:
    """Return how many documents a source has, rejected ones included, for a progress bar.

    Counting reads no image. None if it takes long, for a stream, which would be downloaded twice,
    and for a source that has shards.
    """
    known = folder.known_documents(source)
    if known is not None:
        return known
    if getattr(source, "streaming", False) or folder.data.folder(source.name).exists():
        return None
    number, end = 0, time.monotonic() + MAX_COUNTING_SECONDS
    for _ in source.documents():
        number += 1
        if time.monotonic() > end:
            return None
    return number


def report_speed(report: ProgressCallback) -> Callable[[Part], None]:
    """Return a function that reports documents read, and the speed since its first call."""
    begin = time.monotonic()
    first: Part | None = None

    def progress(part: Part) -> None:
        nonlocal first
        first = first or part
        seconds = max(time.monotonic() - begin, 1e-9)
        done, before = part.total.model_dump(), first.total.model_dump()
        rates = [f"{(done[key] - before[key]) / seconds:,.0f} {key}/s" for key in done]
        rejected = [f"{part.rejected} rejected"] if part.rejected else []
        report(part.documents_read, ", ".join([*rates, *rejected]))

    return progress


def spare_cores() -> int:
    """Return the number of cores that this process may use in addition to its own."""
    try:
        return len(os.sched_getaffinity(0)) - 1
    except AttributeError:  # not on every system
        return (os.cpu_count() or 1) - 1
