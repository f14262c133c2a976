"""Documents → encoded shards: token ids on disk, ready to be mixed and packed.

    source.documents() → chunks ─┬→ texts, in two threads → tokenizer ─┬→ beginning, segments in
                                 └→ images, read ahead → codec ──────┘   order, end → parts of
                                                                           shards

Chunks, and the batches of images inside them, depend on the documents alone: neither the number
of worker processes nor an interruption changes a byte of what is written (`parts.py`). A document
that cannot be encoded is set aside with the reason; the others are not disturbed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from PIL import Image

from moma.data.documents import Document, Rejected, Source, which_held_out
from moma.data.encode.parts import PartialShards, complete_shards, first_rejected
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.tokens import EncodedChunk, EncodeImages, Encoder, EncodeText
from moma.data.shards import REJECTED_FILE, SPLITS, Encoders, ShardInfo, shard_features
from moma.errors import UserError
from moma.recipe import Config
from moma.vocabulary import Vocabulary

# A part ends with the chunk that reaches this, or so many tokens as the recipe says.
PART_ROWS = 1_000_000
# From so many rows on, the share of rejected ones is judged; before, at the end of the source.
ROWS_TO_JUDGE = 100

Progress = Callable[[ShardInfo], None]


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell whether the files behind it have changed."""

    def fingerprint(self) -> str:
        """Changes when the files do."""
        ...


@dataclass(frozen=True)
class Limits:
    """How much may be written at once, and how much may be wrong.

    Attributes:
        shard_tokens: tokens after which a part, and with it a file of each split, ends.
        max_rejected: share of a source's rows that may be rejected.
    """

    shard_tokens: int = 2**25
    max_rejected: float = 0.01


def encode_source(
    source: Source,
    encode_text: EncodeText,
    encode_images: EncodeImages | None,
    vocabulary: Vocabulary,
    held_out_share: float,
    folder: Path,
    *,
    encoders: Encoders | None = None,
    limits: Limits | None = None,
    reader: ImageReader | None = None,
    codec_apart: bool = True,
    progress: Progress = lambda info: None,
) -> ShardInfo:
    """Encode every document of a source into `folder`, or what an earlier process left to do.

    Args:
        source: where the documents come from.
        encode_text: texts → their token ids, none of them special or of an image; in threads.
        encode_images: what the reader made of images → codes, integers of shape [images,
            codes_per_image]. None if there is no codec.
        vocabulary: the ids.
        held_out_share: share of the documents kept from training, where the source itself does
            not decide it.
        folder: the source's own folder; replaced if it was made with other settings.
        encoders: digests of the tokenizer and the codec: shards of others are made anew.
        limits: of a file's size and of the share of rejected rows.
        reader: reads the images; left out, in this process, as RGB arrays.
        codec_apart: whether images are encoded in a thread, beside everything else.
        progress: told what has been encoded so far, at the start and after each chunk.

    Raises:
        UserError: there are no documents, too many rejected rows, or images without a codec.
    """
    limits = limits or Limits()
    origin = ShardInfo(
        source=source.name,
        settings=source_fingerprint(source, held_out_share),
        fingerprint=vocabulary.fingerprint,
        encoders=encoders or Encoders(),
    )
    info = complete_shards(folder, origin)
    if info is None:
        with (
            _reader(reader) as images,
            Encoder(encode_text, encode_images, vocabulary, codec_apart) as encoder,
        ):
            shards = PartialShards(folder, origin, vocabulary)
            encode = partial(encoder.encode, reader=images, chunk_tokens=limits.shard_tokens)
            info = _encode_rest(source, encode, shards, held_out_share, limits, progress)
    _check_rejected(info, limits, folder)
    return info


def _encode_rest(
    source: Source,
    encode: Callable[[Iterable[Document | Rejected]], Iterable[EncodedChunk]],
    shards: PartialShards,
    held_out_share: float,
    limits: Limits,
    progress: Progress,
) -> ShardInfo:
    """Encode the rows that are not on the disk yet, and give the shards their name."""
    if _too_many_rejected(shards.info, limits):
        shards.drop_rejected()  # perhaps they have been mended
    rows = islice(source.documents(), shards.info.rows, None)
    _write(encode(rows), shards, held_out_share, limits, progress)
    _check_rejected(shards.info, limits, shards.folder)
    if not shards.info.total.documents:
        raise UserError(f"source '{source.name}': it has no documents; check its settings")
    return shards.finish()


def source_fingerprint(source: Source, held_out_share: float) -> str:
    """Changes with a source's settings and files, and with what is held out."""
    # How often a source is drawn does not change what its documents are.
    settings = source.model_dump_json(exclude={"weight"}) if isinstance(source, Config) else ""
    fingerprint = source.fingerprint() if isinstance(source, Fingerprinted) else ""
    parts = (source.name, settings, fingerprint, str(held_out_share))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an image of any size, uint8 of shape [H, W, 3]."""
    return np.asarray(image.convert("RGB"))


@contextmanager
def _reader(given: ImageReader | None) -> Iterator[ImageReader]:
    if given is not None:
        yield given
    else:
        with ImageReader(rgb_pixels, workers=0) as reader:
            yield reader


def _write(
    chunks: Iterable[EncodedChunk],
    shards: PartialShards,
    held_out_share: float,
    limits: Limits,
    progress: Progress,
) -> None:
    """Write chunk after chunk, and end a part where it is full."""
    progress(shards.info)
    part = shards.begin_part()
    try:
        for chunk in chunks:
            part.add(_tables(chunk, shards.vocabulary, held_out_share), chunk.rejected)
            so_far = shards.info.with_parts([*shards.info.parts, part.part])
            progress(so_far)
            if so_far.rows >= ROWS_TO_JUDGE:
                _check_rejected(so_far, limits, shards.folder)
            if part.tokens >= limits.shard_tokens or part.rows >= PART_ROWS:
                shards.commit(part)
                part = shards.begin_part()
        if part.rows:
            shards.commit(part)
    finally:
        part.close()


def _too_many_rejected(info: ShardInfo, limits: Limits) -> bool:
    return info.rejected > limits.max_rejected * info.rows


def _check_rejected(info: ShardInfo, limits: Limits, folder: Path) -> None:
    if _too_many_rejected(info, limits):
        raise UserError(
            f"source '{info.source}': {info.rejected} of {info.rows} rows were rejected, more than "
            f"data.max_rejected = {limits.max_rejected:g} allows; the first: "
            f"{first_rejected(folder)} ({REJECTED_FILE} in the data folder names all); "
            "or raise data.max_rejected"
        )


def _tables(
    chunk: EncodedChunk, vocabulary: Vocabulary, held_out_share: float
) -> dict[str, pa.Table]:
    held_out = which_held_out(chunk.documents, held_out_share)
    table = _table(chunk, vocabulary)
    chosen = dict(zip(SPLITS, (~held_out, held_out), strict=True))
    return {split: table.filter(pa.array(rows)) for split, rows in chosen.items()}


def _table(chunk: EncodedChunk, vocabulary: Vocabulary) -> pa.Table:
    schema = shard_features(vocabulary).arrow_schema
    bounds = np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32)
    columns = {
        "ids": pa.ListArray.from_arrays(
            pa.array(bounds), pa.array(chunk.ids, type=schema.field("ids").type.value_type)
        ),
        "images": pa.array(chunk.images, type=pa.int32()),
        "name": pa.array([one.name for one in chunk.documents], type=pa.string()),
    }
    return pa.table(columns, schema=schema)
