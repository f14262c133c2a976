"""Encode one source: documents → chunks → token ids → shards.

Neither the number of worker processes nor an interruption changes a byte of what is written. A
document that cannot be encoded is rejected with the reason; the others are not affected.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from moma.data.cleaning.clean import Cleaning
from moma.data.cleaning.config import CleaningConfig
from moma.data.documents import Source, source_fingerprint, which_held_out
from moma.data.encode.parts import PartialShards, complete_shards, read_rejected
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.rejected import no_documents, too_many_rejected
from moma.data.encode.tokens import EncodedChunk, EncodeImages, Encoder, EncodeText, SplitText
from moma.data.provenance import Encoders
from moma.data.shards import REJECTED_FILE, SPLITS, Part, ShardInfo, shard_features
from moma.vocabulary import Vocabulary

# A part ends with the chunk that reaches this or the recipe's `shard_tokens`.
PART_DOCUMENTS = 1_000_000
# With fewer documents, the fraction of rejected ones is checked at the end of the source only.
MIN_DOCUMENTS_TO_CHECK = 100

Progress = Callable[[Part], None]


@dataclass(frozen=True)
class Limits:
    """Limits of what is written.

    Attributes:
        shard_tokens: tokens after which a part, and with it a file of each split, ends.
        max_rejected: maximum fraction of a source's documents that may be rejected.
    """

    shard_tokens: int = 2**25
    max_rejected: float = 0.01

    def exceeded(self, part: Part) -> bool:
        """Return whether too many documents were rejected."""
        return part.rejected > self.max_rejected * part.documents_read


def encode_source(
    source: Source,
    encode_text: EncodeText,
    encode_images: EncodeImages | None,
    vocabulary: Vocabulary,
    held_out_share: float,
    folder: Path,
    *,
    cleaning: Cleaning | None = None,
    encoders: Encoders | None = None,
    limits: Limits | None = None,
    reader: ImageReader | None = None,
    codec_in_thread: bool = True,
    split_text: SplitText = lambda text: [text],
    progress: Progress = lambda part: None,
) -> ShardInfo:
    """Encode the documents of a source that an earlier, interrupted call has not encoded yet.

    Args:
        encode_text: texts → their token ids, none of them special or of an image; called in
            threads.
        encode_images: preprocessed images → codes, integers of shape [images, codes_per_image];
            None without a codec.
        held_out_share: fraction of the documents held out, unless the source itself decides.
        folder: the source's own folder; replaced if it was made from something else.
        cleaning: drops documents and images; nothing by default.
        encoders: fingerprints of tokenizer and codec: shards of others are replaced.
        reader: reads the images; by default in this process, as RGB arrays.
        split_text: cuts a long text into pieces whose ids are those of the text.
        progress: called with what has been encoded so far, at the start and after each chunk.

    Raises:
        UserError: there are no documents, too many rejected ones, or images without a codec, or
            the folder has files that moma did not write.
    """
    limits, cleaning = limits or Limits(), cleaning or Cleaning(CleaningConfig())
    origin = ShardInfo(
        source=source.name,
        source_fingerprint=source_fingerprint(source, held_out_share, cleaning.fingerprint),
        vocabulary_fingerprint=vocabulary.fingerprint,
        encoders=encoders or Encoders(),
    )
    info = complete_shards(folder, origin)
    if info is not None:
        _check_rejected(source, info.whole, limits, folder)
        return info
    reader = reader or ImageReader(to_rgb, workers=0)
    encoder = Encoder(encode_text, encode_images, vocabulary, codec_in_thread, split_text)
    with encoder:
        shards = PartialShards(folder, origin, vocabulary)
        if limits.exceeded(shards.done):
            shards.drop_rejected()  # they may have been fixed
        _write(source, cleaning, encoder, reader, shards, held_out_share, limits, progress)
    _check_rejected(source, shards.done, limits, folder)
    if not shards.done.total.documents:
        raise no_documents(source, shards.done.dropped)
    return shards.finish()


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image of any size, uint8 of shape [H, W, 3]."""
    return np.asarray(image.convert("RGB"))


def _write(
    source: Source,
    cleaning: Cleaning,
    encoder: Encoder,
    reader: ImageReader,
    shards: PartialShards,
    held_out_share: float,
    limits: Limits,
    progress: Progress,
) -> None:
    """Encode and write the documents that are not on disk yet, in parts."""
    progress(shards.done)
    rest = islice(cleaning.rows(source.documents()), shards.done.documents_read, None)
    writer = shards.begin_part()
    try:
        for chunk in encoder.encode(rest, reader, limits.shard_tokens):
            tables = _tables(chunk, shards.vocabulary, held_out_share)
            writer.add(tables, chunk.rejected, chunk.dropped_images)
            part = writer.part
            so_far = shards.done + part
            progress(so_far)
            if so_far.documents_read >= MIN_DOCUMENTS_TO_CHECK:
                _check_rejected(source, so_far, limits, shards.folder)
            if part.total.tokens >= limits.shard_tokens or part.documents_read >= PART_DOCUMENTS:
                shards.commit(writer)
                writer = shards.begin_part()
        if writer.part.documents_read:
            shards.commit(writer)
    finally:
        writer.close()


def _check_rejected(source: Source, part: Part, limits: Limits, folder: Path) -> None:
    if limits.exceeded(part):
        raise too_many_rejected(
            source.name,
            part.rejected,
            part.documents_read,
            limits.max_rejected,
            read_rejected(folder),
            f" ({REJECTED_FILE} in the data folder lists all)",
        )


def _tables(
    chunk: EncodedChunk, vocabulary: Vocabulary, held_out_share: float
) -> dict[str, pa.Table]:
    """Return the documents of a chunk as a table of each split."""
    held_out = which_held_out(chunk.documents, held_out_share)
    schema = shard_features(vocabulary).arrow_schema
    offsets = pa.array(np.concatenate([[0], np.cumsum(chunk.lengths)]), type=pa.int32())
    ids = pa.array(chunk.ids, type=schema.field("ids").type.value_type)
    columns = {
        "ids": pa.ListArray.from_arrays(offsets, ids),
        "images": pa.array(chunk.images, type=pa.int32()),
        "name": pa.array([document.name for document in chunk.documents], type=pa.string()),
    }
    table = pa.table(columns, schema=schema)
    masks = dict(zip(SPLITS, (~held_out, held_out), strict=True))
    return {split: table.filter(pa.array(mask)) for split, mask in masks.items()}
