"""What encodes the parts of all sources, in this process or in another one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch

from moma.data.documents import SourcePart
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.source import SourceEncoding
from moma.data.encode.tokens import BATCH_IMAGES, EncodeImages, Encoder
from moma.data.shards import PartRecord
from moma.data.sources.listings import Listings
from moma.images import square_pixels
from moma.runs import Tokenizers
from moma.runtime.allocator import keep_freed_memory
from moma.tokenizers.image.codec import ImageCodec, read_codec_config, to_float
from moma.tokenizers.text import encode_texts, load_text_tokenizer, split_text
from moma.vocabulary import Vocabulary


class Task(NamedTuple):
    """A part to encode: name of the source, number of the part, and what it reads."""

    source: str
    number: int
    part: SourcePart


class Encoded(NamedTuple):
    """What is encoded of a part.

    Attributes:
        task: the part.
        so_far: all of it as one.
        records: its records once it is complete, else None.
        node: name of the machine; empty for this one.
    """

    task: Task
    so_far: PartRecord
    records: list[PartRecord] | None = None
    node: str = ""


@dataclass(frozen=True)
class Job:
    """What a process needs to encode parts; can be sent to another process.

    Attributes:
        sources: how each source is encoded, by its name.
        vocabulary: the ids.
        tokenizers: folder of the tokenizer and the codec.
    """

    sources: Mapping[str, SourceEncoding]
    vocabulary: Vocabulary
    tokenizers: Path

    @property
    def image_size(self) -> int | None:
        """Side of the codec's images in pixels; None without a codec."""
        folder = Tokenizers(self.tokenizers).codec
        return read_codec_config(folder).image_size if folder.exists() else None

    def load_codec(self, device: torch.device) -> EncodeImages:
        """Return what encodes images with a codec on a device."""
        codec = ImageCodec.load(Tokenizers(self.tokenizers).codec).to(device)
        return partial(encode_images, codec, device)


class Worker:
    """Encodes parts; a context manager that ends its threads and processes."""

    def __init__(
        self, job: Job, encode: EncodeImages | None, codec_in_thread: bool, image_processes: int = 0
    ) -> None:
        """Load the tokenizer.

        Args:
            encode: encodes images, see `Job.load_codec`; None without a codec.
            codec_in_thread: whether it is called in a thread of its own.
            image_processes: processes that read images ahead.
        """
        self._job, self._listings = job, Listings()
        tokenizer = load_text_tokenizer(Tokenizers(job.tokenizers).text)
        self._encoder = Encoder(
            partial(encode_texts, tokenizer),
            encode,
            job.vocabulary,
            codec_in_thread,
            partial(split_text, tokenizer),
        )
        preprocess = partial(square_pixels, size=job.image_size or 1)
        self._reader = ImageReader(preprocess, image_processes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._encoder.__exit__(*error)
        self._reader.__exit__(*error)

    def encode(self, task: Task, progress: Callable[[PartRecord], None]) -> list[PartRecord]:
        """Encode a part; see `SourceEncoding.encode_part`."""
        encoding = self._job.sources[task.source]
        with self._listings:
            return encoding.encode_part(
                task.number, task.part, self._encoder, self._reader, progress
            )


def local_worker(job: Job, device: torch.device, image_processes: int = 0) -> Worker:
    """Return a worker with a codec of its own."""
    keep_freed_memory(device)
    encode = None if job.image_size is None else job.load_codec(device)
    return Worker(job, encode, device.type != "cpu", image_processes)


def encode_together(
    encode: EncodeImages, requests: Iterable[Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """Encode the images of several requests in one call; return the codes of each."""
    requests = [*requests]
    codes = encode([image for images in requests for image in images])
    return np.split(codes, np.cumsum([*map(len, requests)])[:-1])


def encode_images(
    codec: ImageCodec, device: torch.device, pixels: Sequence[np.ndarray]
) -> np.ndarray:
    """Encode images of the codec's size to codes, int64 of shape [images, codes_per_image].

    On a GPU, batches always have `BATCH_IMAGES` images, so that the codes of an image do not depend
    on how many others there are.

    Args:
        pixels: pixels of each image, uint8 of shape [H, W, 3].
    """
    count = len(pixels)
    size = count if device.type == "cpu" else BATCH_IMAGES
    padded = [*pixels, *[pixels[0]] * (-count % size)]
    pixels_BHW3 = torch.from_numpy(np.stack(padded)).to(device)
    codes = [codec.encode(to_float(batch_BHW3)) for batch_BHW3 in pixels_BHW3.split(size)]
    return torch.cat(codes)[:count].cpu().numpy()
