"""Files of a part of a source while they are written, and the record that commits them."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import pyarrow as pa

from moma.data.documents import Rejected
from moma.data.encode.rejected import rejected_line
from moma.data.mapped_files import METADATA_KEY
from moma.data.shards import (
    SPLITS,
    Counts,
    PartRecord,
    ShardInfo,
    file_name,
    file_origin,
    read_config,
)
from moma.files import (
    UNFINISHED,
    add_path_to_errors,
    atomic_write,
    checksum,
    sync_file,
    sync_folder,
)


class PartWriter:
    """Files of a part while they are written: one for each split, and rejected documents.

    Attributes:
        record: what was added so far.
    """

    def __init__(
        self,
        folder: Path,
        info: ShardInfo,
        part: int,
        file: int,
        first: int,
        schema: pa.Schema,
        upload: Callable[[PartRecord], None] = lambda record: None,
    ) -> None:
        """Write no file yet.

        Args:
            info: source and origin of the documents, which the files' metadata record.
            part, file: number of the part, and of the files among those of the part.
            first: number of documents of the part before these files.
            schema: columns of the Arrow files; see `shard_features`.
            upload: called with the record before it is written, when its files are complete.
        """
        self._upload = upload
        self._folder, self._source = folder, info.source
        self.record = PartRecord(part=part, file=file, first=first, stop=first)
        origin = {**file_origin(info), "part": part, "file": file}
        metadata = {**(schema.metadata or {}), METADATA_KEY: json.dumps(origin).encode()}
        self._schema = schema.with_metadata(metadata)
        # A process that is taken for lost may still write the same part.
        self._unfinished = f".{uuid4().hex[:8]}{UNFINISHED}"
        self._open = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._writers: dict[str, pa.RecordBatchStreamWriter] = {}

    def close(self) -> None:
        """Close the files; what was not committed is lost."""
        self._open.close()

    def add(
        self,
        tables: dict[str, pa.Table],
        rejected: Sequence[Rejected],
        dropped_images: Sequence[Rejected] = (),
    ) -> None:
        """Write the next documents.

        Args:
            tables: those that are encoded, by split.
            rejected: the others, also those that were dropped.
            dropped_images: images that were dropped of encoded documents.

        Raises:
            OSError: they cannot be written; the error has the folder's path.
        """
        with add_path_to_errors(self._folder):
            for split, table in tables.items():
                if table.num_rows:
                    metadata = self._schema.metadata
                    self._writer(split).write_table(table.replace_schema_metadata(metadata))
            if listed := [*rejected, *dropped_images]:
                file = self._file(rejected_name(self.record))
                file.writelines(rejected_line(self._source, row) for row in listed)
                file.flush()  # they may be read before the files are committed
        counts = dict.fromkeys(SPLITS, Counts())
        counts |= {split: _count(table) for split, table in tables.items()}
        read = sum(count.documents for count in counts.values()) + len(rejected)
        dropped = Counter(row.dropped_by for row in rejected)
        unusable = dropped.pop("", 0)
        own = self.record
        self.record = own + PartRecord(
            stop=read,
            counts=counts,
            rejected=unusable,
            dropped=dropped,
            dropped_images=Counter(image.dropped_by for image in dropped_images),
        )
        self.record = self.record.model_copy(update={"part": own.part, "file": own.file})

    def commit(self, is_last: bool) -> PartRecord:
        """Sync the files, rename them, and write their record: a kill does not lose them now.

        Args:
            is_last: whether the part has no more documents.

        Raises:
            OSError: a file cannot be written; the error has the folder's path.
        """
        with add_path_to_errors(self._folder):
            for writer in self._writers.values():
                writer.close()
            for file in self._files.values():
                sync_file(file)
            self._open.close()
        checksums = {}
        for name in self._files:
            unfinished = self._folder / (name + self._unfinished)
            checksums[name] = checksum(unfinished)
            os.replace(unfinished, self._folder / name)
        sync_folder(self._folder)
        changes = {"is_last": is_last, "checksums": checksums}
        self.record = self.record.model_copy(update=changes)
        self._upload(self.record)
        text = self.record.model_dump_json() + "\n"
        atomic_write(self._folder / record_name(self.record.part, self.record.file), text)
        return self.record

    def _writer(self, split: str) -> pa.RecordBatchStreamWriter:
        if split not in self._writers:
            file = self._file(file_name(split, self.record.name))
            self._writers[split] = pa.ipc.new_stream(file, self._schema)
        return self._writers[split]

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            path = self._folder / (name + self._unfinished)
            self._files[name] = self._open.enter_context(path.open("wb"))
        return self._files[name]


def read_records(folder: Path, part: int) -> list[PartRecord]:
    """Return what is committed of a part in a folder of partial files.

    Where a part was made again elsewhere, records of its older files may follow: they do not count.
    """
    records: list[PartRecord] = []
    while not (records and records[-1].is_last):
        record = read_config(PartRecord, folder / record_name(part, len(records)))
        if record is None or record.first != (records[-1].stop if records else 0):
            break
        records.append(record)
    return records


def record_name(part: int | None, file: int) -> str:
    """Return the file name of the record of a part's files."""
    return f"part-{PartRecord(part=part, file=file).name}.json"


def rejected_name(record: PartRecord) -> str:
    """Return the name of the file of a record's rejected documents."""
    return f"rejected-{record.name}.jsonl"


def _count(table: pa.Table) -> Counts:
    return Counts(
        documents=table.num_rows,
        tokens=len(table.column("ids").combine_chunks().flatten()),
        images=int(np.sum(table.column("images").to_numpy())),
    )
