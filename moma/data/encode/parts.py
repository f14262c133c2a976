"""Shards in the making: part after part, so that a kill at any moment loses and doubles nothing.

    SOURCE.partial/  making.json, and part after part its files, then `part-00000.json`
                     → shard.json, rejected.jsonl → renamed to SOURCE/

A part is a range of the source's rows. Its files are written under other names, brought to the disk
(fsync) and renamed; the part counts from the moment its `part-….json` is there. So a process may
be killed at any moment: the next one finds the parts that count, deletes the rest, and goes on with
the first row that no part covers.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import datasets
import numpy as np
import pyarrow as pa

from moma.data.documents import Rejected
from moma.data.shards import (
    INFO_FILE,
    METADATA_KEY,
    REJECTED_FILE,
    SPLITS,
    VOCABULARY_FILE,
    Counts,
    Part,
    ShardInfo,
    file_name,
    file_origin,
    read_config,
    read_info,
    shard_features,
    sum_counts,
)
from moma.files import (
    UNFINISHED,
    add_path_to_errors,
    atomic_open,
    atomic_write,
    sync_file,
    sync_folder,
)
from moma.vocabulary import Vocabulary

_MAKING_FILE = "making.json"


class PartialShards:
    """The shards of one source while they are made; resumes what an earlier process left.

    Attributes:
        info: what is on disk so far.
        folder: where they stand when they are whole.
        vocabulary: the ids.
    """

    def __init__(self, folder: Path, origin: ShardInfo, vocabulary: Vocabulary) -> None:
        """Find the parts that count, and delete everything else.

        Args:
            folder: where the shards stand when they are whole.
            origin: what is encoded with which settings, without parts; parts of another origin
                are deleted.
            vocabulary: the ids.
        """
        self.folder = folder
        self.path = partial_folder(folder)
        self.vocabulary = vocabulary
        if read_config(ShardInfo, self.path / _MAKING_FILE) != origin:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            atomic_write(self.path / _MAKING_FILE, origin.model_dump_json() + "\n")
        self.info = origin
        self._keep(list(self._committed()))

    def begin_part(self) -> "PartWriter":
        """Begin the part after the last one."""
        return PartWriter(self.path, self.info, shard_features(self.vocabulary))

    def commit(self, part: "PartWriter") -> None:
        """Put a part on the disk; from here on it counts."""
        self.info = self.info.with_parts([*self.info.parts, part.commit()])

    def drop_rejected(self) -> None:
        """Forget the first part with a rejected row and all that follow."""
        rejected = [bool(part.rejected) for part in self.info.parts]
        self._keep(list(self.info.parts[: rejected.index(True)]))

    def finish(self) -> ShardInfo:
        """Give the shards their name; they replace older ones."""
        with atomic_open(self.path / REJECTED_FILE) as all_rejected:
            copy_rejected(self.folder, all_rejected)
        self.vocabulary.save(self.path / VOCABULARY_FILE)
        atomic_write(self.path / INFO_FILE, self.info.model_dump_json(indent=2) + "\n")
        _put_in_place(self.folder)
        return self.info

    def _committed(self) -> Iterator[Part]:
        number = 0
        while (part := read_config(Part, self.path / _part_name(number))) is not None:
            yield part
            number += 1

    def _keep(self, parts: list[Part]) -> None:
        """Delete everything that does not belong to these first parts."""
        self.info = self.info.with_parts(parts)
        kept = {_MAKING_FILE}
        for number in range(len(parts)):
            kept |= {_part_name(number), _rejected_name(number)}
            kept |= {file_name(split, number) for split in SPLITS}
        # Records first, the last of them before the others: what still counts is whole.
        order = sorted(
            self.path.iterdir(),
            key=lambda path: (path.name.startswith("part-"), len(path.name), path.name),
            reverse=True,
        )
        for path in order:
            if path.name not in kept:
                path.unlink()


class PartWriter:
    """One part while it is written: a file a split, and its rejected rows."""

    def __init__(self, folder: Path, info: ShardInfo, features: datasets.Features) -> None:
        self._folder, self._number, self._source = folder, len(info.parts), info.source
        self.part = Part(
            first=info.rows, stop=info.rows, counts=dict.fromkeys(SPLITS, Counts()), rejected=0
        )
        origin = {**file_origin(info), "part": self._number}
        schema = features.arrow_schema
        metadata = {**(schema.metadata or {}), METADATA_KEY: json.dumps(origin).encode()}
        self._schema = schema.with_metadata(metadata)
        self._open = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._writers: dict[str, pa.RecordBatchStreamWriter] = {}

    def close(self) -> None:
        """Close the files; without `commit`, nothing of them counts."""
        self._open.close()

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum_counts(self.part.counts.values()).tokens

    @property
    def rows(self) -> int:
        """Rows of the source that it covers."""
        return self.part.stop - self.part.first

    def add(self, tables: dict[str, pa.Table], rejected: Sequence[Rejected]) -> None:
        """Write the next rows: encoded documents by split, and rejected ones.

        Raises:
            OSError: they cannot be written; it names the folder.
        """
        with add_path_to_errors(self._folder):
            self._add(tables, rejected)

    def _add(self, tables: dict[str, pa.Table], rejected: Sequence[Rejected]) -> None:
        counts = dict(self.part.counts)
        for split, table in tables.items():
            if table.num_rows:
                metadata = self._schema.metadata
                self._writer(split).write_table(table.replace_schema_metadata(metadata))
                counts[split] = counts[split].plus(_count(table))
        if rejected:
            file = self._file(_rejected_name(self._number))
            for row in rejected:
                file.write(rejected_line(self._source, row))
            file.flush()  # for who reads them before the part ends
        rows = sum(table.num_rows for table in tables.values()) + len(rejected)
        self.part = Part(
            first=self.part.first,
            stop=self.part.stop + rows,
            counts=counts,
            rejected=self.part.rejected + len(rejected),
        )

    def commit(self) -> Part:
        """Bring the files to the disk, give them their names, and then the part's record."""
        with add_path_to_errors(self._folder):
            for writer in self._writers.values():
                writer.close()
            for file in self._files.values():
                sync_file(file)
            self._open.close()
        for name in self._files:
            os.replace(self._folder / (name + UNFINISHED), self._folder / name)
        sync_folder(self._folder)
        atomic_write(self._folder / _part_name(self._number), self.part.model_dump_json() + "\n")
        return self.part

    def _writer(self, split: str) -> pa.RecordBatchStreamWriter:
        if split not in self._writers:
            file = self._file(file_name(split, self._number))
            self._writers[split] = pa.ipc.new_stream(file, self._schema)
        return self._writers[split]

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            path = self._folder / (name + UNFINISHED)
            self._files[name] = self._open.enter_context(path.open("wb"))
        return self._files[name]


def complete_shards(folder: Path, origin: ShardInfo) -> ShardInfo | None:
    """The shards of a source, if they are whole and of this origin; else None."""
    partial = read_info(partial_folder(folder))
    if partial is not None and partial.same_origin(origin):
        _put_in_place(folder)  # a process was killed just before it did
    found = read_info(folder)
    if found is None or not found.same_origin(origin):
        return None
    for leftover in (partial_folder(folder), _old_folder(folder)):
        shutil.rmtree(leftover, ignore_errors=True)
    return found


def _put_in_place(folder: Path) -> None:
    """Give finished shards their name; any of these steps may be the last, and is done again."""
    partial, old = partial_folder(folder), _old_folder(folder)
    for pattern in ("part-*.json", "rejected-*.jsonl", _MAKING_FILE):
        for path in partial.glob(pattern):
            path.unlink()
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_rejected(folder: Path, out: BinaryIO) -> None:
    """Append the rejected rows of a source to a file, those of an unfinished part included."""
    for path in _rejected_files(folder):
        _copy(path, out)


def rejected_line(source: str, row: Rejected) -> bytes:
    """A row as `rejected.jsonl` names it."""
    line = {"source": source, "row": row.row, "reason": row.reason}
    return json.dumps(line).encode() + b"\n"


def first_rejected(folder: Path) -> str:
    """The first rejected row of a source and the reason."""
    with next(path for path in _rejected_files(folder)).open("rb") as file:
        line = json.loads(file.readline())
    return Rejected(line["row"], line["reason"]).told


def partial_folder(folder: Path) -> Path:
    """Where the shards of a source stand while they are made."""
    return folder.with_name(folder.name + ".partial")


def _old_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _rejected_files(folder: Path) -> list[Path]:
    partial = partial_folder(folder)
    if not partial.exists():
        return [path for path in [folder / REJECTED_FILE] if path.exists()]
    paths = partial.glob("rejected-*.jsonl*")
    return sorted(paths, key=lambda path: int(path.name.split("-")[1].split(".")[0]))


def _copy(path: Path, out: BinaryIO) -> None:
    with path.open("rb") as file:
        shutil.copyfileobj(file, out)


def _part_name(number: int) -> str:
    return f"part-{number:05}.json"


def _rejected_name(number: int) -> str:
    return f"rejected-{number:05}.jsonl"


def _count(table: pa.Table) -> Counts:
    return Counts(
        documents=table.num_rows,
        tokens=len(table.column("ids").combine_chunks().flatten()),
        images=int(np.sum(table.column("images").to_numpy())),
    )
