"""Encode one source: documents → chunks → token ids → shards.

    source.documents() → chunks ─┬→ texts, in two threads → tokenizer ─┬→ beginning, segments in
                                 └→ images, read ahead → codec ──────┘   order, end → parts of
                                                                         shards

Neither the number of worker processes nor an interruption changes a byte of what is written. A
document that cannot be encoded is rejected with the reason; the others are not affected.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from moma.data.documents import Document, Rejected, Source, source_fingerprint, which_held_out
from moma.data.encode.parts import PartialShards, complete_shards, first_rejected
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.tokens import EncodedChunk, EncodeImages, Encoder, EncodeText
from moma.data.provenance import Encoders
from moma.data.shards import REJECTED_FILE, SPLITS, ShardInfo, shard_features
from moma.errors import UserError
from moma.vocabulary import Vocabulary

# A part ends with the chunk that reaches this or the recipe's `shard_tokens`.
PART_DOCUMENTS = 1_000_000
# With fewer documents, the fraction of rejected ones is checked at the end of the source only.
MIN_DOCUMENTS_TO_CHECK = 100

Progress = Callable[[ShardInfo], None]


@dataclass(frozen=True)
class Limits:
    """Limits of what is written.

    Attributes:
        shard_tokens: tokens after which a part, and with it a file of each split, ends.
        max_rejected: maximum fraction of a source's documents that may be rejected.
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
    codec_in_thread: bool = True,
    progress: Progress = lambda info: None,
) -> ShardInfo:
    """Encode the documents of a source that an earlier, interrupted call has not encoded yet.

    Args:
        source: where the documents come from.
        encode_text: texts → their token ids, none of them special or of an image; called in
            threads.
        encode_images: preprocessed images → codes, integers of shape [images, codes_per_image].
            None if there is no codec.
        vocabulary: the ids.
        held_out_share: fraction of the documents held out, unless the source itself decides.
        folder: the source's own folder; replaced if it was made from something else.
        encoders: fingerprints of tokenizer and codec: shards of others are replaced.
        limits: limits of a file's size and of rejected documents.
        reader: reads the images; by default in this process, as RGB arrays.
        codec_in_thread: whether images are encoded in a thread of their own.
        progress: called with what has been encoded so far, at the start and after each chunk.

    Raises:
        UserError: there are no documents, too many rejected ones, or images without a codec, or
            the folder has files that moma did not write.
    """
    limits = limits or Limits()
    origin = ShardInfo(
        source=source.name,
        source_fingerprint=source_fingerprint(source, held_out_share),
        vocabulary_fingerprint=vocabulary.fingerprint,
        encoders=encoders or Encoders(),
    )
    info = complete_shards(folder, origin)
    if info is None:
        with (
            _reader_or_default(reader) as images,
            Encoder(encode_text, encode_images, vocabulary, codec_in_thread) as encoder,
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
    """Encode the documents that are not on disk yet, and put the shards in place."""
    if _too_many_rejected(shards.info, limits):
        shards.drop_rejected()  # they may have been fixed
    rest = islice(source.documents(), shards.info.documents_read, None)
    _write(encode(rest), shards, held_out_share, limits, progress)
    _check_rejected(shards.info, limits, shards.folder)
    if not shards.info.total.documents:
        raise UserError(f"source '{source.name}': it has no documents; check its configuration")
    return shards.finish()


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image of any size, uint8 of shape [H, W, 3]."""
    return np.asarray(image.convert("RGB"))


@contextmanager
def _reader_or_default(reader: ImageReader | None) -> Iterator[ImageReader]:
    if reader is not None:
        yield reader
    else:
        with ImageReader(to_rgb, workers=0) as default:
            yield default


def _write(
    chunks: Iterable[EncodedChunk],
    shards: PartialShards,
    held_out_share: float,
    limits: Limits,
    progress: Progress,
) -> None:
    """Write chunk after chunk, and start another part when one is full."""
    progress(shards.info)
    part = shards.begin_part()
    try:
        for chunk in chunks:
            part.add(_tables(chunk, shards.vocabulary, held_out_share), chunk.rejected)
            so_far = shards.info.with_parts([*shards.info.parts, part.part])
            progress(so_far)
            if so_far.documents_read >= MIN_DOCUMENTS_TO_CHECK:
                _check_rejected(so_far, limits, shards.folder)
            if part.tokens >= limits.shard_tokens or part.documents_read >= PART_DOCUMENTS:
                shards.commit(part)
                part = shards.begin_part()
        if part.documents_read:
            shards.commit(part)
    finally:
        part.close()


def _too_many_rejected(info: ShardInfo, limits: Limits) -> bool:
    return info.rejected > limits.max_rejected * info.documents_read


def _check_rejected(info: ShardInfo, limits: Limits, folder: Path) -> None:
    if _too_many_rejected(info, limits):
        raise UserError(
            f"source '{info.source}': {info.rejected} of {info.documents_read} documents were "
            f"rejected, more than data.max_rejected = {limits.max_rejected:g} allows; the first: "
            f"{first_rejected(folder).message} ({REJECTED_FILE} in the data folder lists all); "
            "or raise data.max_rejected"
        )


def _tables(
    chunk: EncodedChunk, vocabulary: Vocabulary, held_out_share: float
) -> dict[str, pa.Table]:
    """Return the documents of a chunk as a table of each split."""
    held_out = which_held_out(chunk.documents, held_out_share)
    schema = shard_features(vocabulary).arrow_schema
    offsets = np.concatenate([[0], np.cumsum(chunk.lengths)]).astype(np.int32)
    columns = {
        "ids": pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(chunk.ids, type=schema.field("ids").type.value_type)
        ),
        "images": pa.array(chunk.images, type=pa.int32()),
        "name": pa.array([one.name for one in chunk.documents], type=pa.string()),
    }
    table = pa.table(columns, schema=schema)
    masks = dict(zip(SPLITS, (~held_out, held_out), strict=True))
    return {split: table.filter(pa.array(mask)) for split, mask in masks.items()}
