"""Encode one source, part by part: documents → chunks → token ids → shards.

Neither the number of processes nor an interruption changes a byte of what is written. A document
that cannot be encoded is rejected with the reason; the others are not affected.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from moma.data.cleaning.clean import Cleaning
from moma.data.cleaning.config import CleaningConfig
from moma.data.documents import (
    SourceConfig,
    SourcePart,
    source_fingerprint,
    which_held_out,
)
from moma.data.encode.part_writer import PartWriter, read_records
from moma.data.encode.parts import (
    PartialShards,
    complete_shards,
    partial_folder,
    read_rejected,
)
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.rejected import no_documents, too_many_rejected
from moma.data.encode.tokens import EncodedChunk, Encoder
from moma.data.encode.upload import Remote, SourceUpload
from moma.data.provenance import Encoders
from moma.data.remote.reading import LINK_FILE, read_link
from moma.data.shards import REJECTED_FILE, SPLITS, PartRecord, ShardInfo, shard_features
from moma.data.sources.parts import PART_BYTES
from moma.vocabulary import Vocabulary

# Files end with the chunk that reaches this or the recipe's `shard_tokens`.
FILE_DOCUMENTS = 1_000_000
# With fewer documents, the fraction of rejected ones is checked at the end of the source only.
MIN_DOCUMENTS_TO_CHECK = 100


@dataclass(frozen=True)
class SourceEncoding:
    """How one source is encoded; can be sent to another process.

    Attributes:
        source: the source.
        vocabulary: the ids.
        held_out_share: fraction of the documents held out, unless the source itself decides.
        folder: the source's own folder; replaced if it was made from something else.
        encoders: fingerprints of tokenizer and codec: shards of others are replaced.
        shard_tokens: tokens after which the files of a part end and others begin.
        max_rejected: maximum fraction of the documents that may be rejected.
        part_bytes: approximate size of a part of the source.
        cleaning: drops documents and images; nothing by default.
        remote: where the files are kept; by default in the folder.
    """

    source: SourceConfig
    vocabulary: Vocabulary
    held_out_share: float
    folder: Path
    encoders: Encoders = field(default_factory=Encoders)
    shard_tokens: int = 2**25
    max_rejected: float = 0.01
    part_bytes: int = PART_BYTES
    cleaning: Cleaning = field(default_factory=lambda: Cleaning(CleaningConfig()))
    remote: Remote | None = None

    @cached_property
    def origin(self) -> ShardInfo:
        """What the shards are made from."""
        return ShardInfo(
            source=self.source.name,
            source_fingerprint=source_fingerprint(
                self.source, self.held_out_share, self.cleaning.fingerprint
            ),
            vocabulary_fingerprint=self.vocabulary.fingerprint,
            encoders=self.encoders,
        )

    @property
    def unfinished_folder(self) -> Path:
        """Where the files are until all parts are complete."""
        return partial_folder(self.folder)

    def find_complete(self, verify: bool = False) -> ShardInfo | None:
        """Return the shards if they are complete.

        Args:
            verify: whether to compare checksums; damaged files are then deleted.

        Raises:
            UserError: too many documents were rejected, or there are files of the user's.
        """
        info = complete_shards(self.folder, self.origin, verify)
        if info is not None:
            self.check_rejected(info.whole)
        return info

    def begin(
        self, verify: bool = False, is_own: Callable[[int], bool] = lambda number: True
    ) -> PartialShards:
        """Cut the source into parts, or find those that an earlier process left.

        Args:
            verify: as in `find_complete`.
            is_own: whether a part, by its number, is encoded here and not on another machine.
        """
        shards = PartialShards(
            self.folder,
            self.origin,
            self.part_bytes,
            self.source.parts,
            self._connect_and_link,
            is_own,
        )
        if verify:
            shards.drop_damaged()
        if self._exceeds_limit(shards.done):
            shards.drop_rejected()  # they may have been fixed
        return shards

    def encode_part(
        self,
        number: int,
        part: SourcePart,
        encoder: Encoder,
        reader: ImageReader,
        progress: Callable[[PartRecord], None] = lambda part: None,
    ) -> list[PartRecord]:
        """Encode what is not on disk yet of a part; return the records of all of it.

        Args:
            number, part: of the plan of the source.
            encoder: encodes texts and images.
            reader: reads the images.
            progress: called with what is encoded of the part, at the start and after each chunk.

        Raises:
            UserError: too many of the source's first documents were rejected.
            OSError: files cannot be written.
        """
        folder = self.unfinished_folder
        records = read_records(folder, number)
        if records and records[-1].is_last:
            return records
        done = sum(records, PartRecord())
        progress(done)
        schema = shard_features(self.vocabulary).arrow_schema
        upload = self._upload_to(folder)

        def begin() -> PartWriter:
            return PartWriter(folder, self.origin, number, len(records), done.stop, schema, upload)

        rows = self.cleaning.rows(self.source.read_part(part), number)
        rest = islice(rows, done.documents_read, None)
        writer = begin()
        try:
            for chunk in encoder.encode(rest, reader, self.shard_tokens):
                tables = _tables(chunk, self.vocabulary, self.held_out_share)
                writer.add(tables, chunk.rejected, chunk.dropped_images)
                so_far = done + writer.record
                progress(so_far)
                # Of a later part, it is not known what precedes it.
                if number == 0 and so_far.documents_read >= MIN_DOCUMENTS_TO_CHECK:
                    self.check_rejected(so_far)
                if self._is_full(writer.record):
                    records.append(writer.commit(is_last=False))
                    done = so_far
                    writer = begin()
            records.append(writer.commit(is_last=True))
        finally:
            writer.close()
        return records

    def add(self, shards: PartialShards, number: int, records: list[PartRecord]) -> None:
        """Note a part that was encoded; raises `UserError` if too many documents were rejected."""
        shards.add(number, records)
        if shards.beginning.documents_read >= MIN_DOCUMENTS_TO_CHECK:
            self.check_rejected(shards.beginning)

    def finish(self, shards: PartialShards) -> ShardInfo:
        """Put complete shards in place; raises `UserError` if there are too few documents."""
        self.check_rejected(shards.done)
        if not shards.done.total.documents:
            raise no_documents(self.source, shards.done.dropped)
        return shards.finish(self.vocabulary)

    def check_rejected(self, part: PartRecord) -> None:
        """Raise `UserError` if too many documents were rejected."""
        if self._exceeds_limit(part):
            raise too_many_rejected(
                self.source.name,
                part.rejected,
                part.documents_read,
                self.max_rejected,
                read_rejected(self.folder),
                f" ({REJECTED_FILE} in the data folder lists all)",
            )

    def _exceeds_limit(self, part: PartRecord) -> bool:
        return part.rejected > self.max_rejected * part.documents_read

    def _connect_and_link(self, folder: Path) -> SourceUpload | None:
        if self.remote is None:
            (folder / LINK_FILE).unlink(missing_ok=True)
            return None
        upload = self.remote.connect(folder, self.source.name, self.shard_tokens)
        upload.link(folder)
        return upload

    def _upload_to(self, folder: Path) -> Callable[[PartRecord], None]:
        link = read_link(folder)
        if self.remote is None or link is None:
            return lambda record: None
        upload = SourceUpload(link, self.remote.cache)
        return partial(upload.upload, folder)

    def _is_full(self, record: PartRecord) -> bool:
        full = record.total.tokens >= self.shard_tokens
        return full or record.documents_read >= FILE_DOCUMENTS


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
