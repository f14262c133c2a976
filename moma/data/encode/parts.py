"""Shards while they are written, part after part, so that a kill at any time loses nothing.

    SOURCE.partial/  origin.json, then for each part its files and `part-00000.json`
                     → shard.json, rejected.jsonl → renamed to SOURCE/

A part covers a range of the source's documents. Its files are written under temporary names,
synced to disk and renamed; the part is committed once its `part-….json` exists. The next process
keeps the committed parts, deletes the rest, and continues with the first document after them.
"""

import json
import os
import re
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
from moma.errors import UserError
from moma.files import (
    UNFINISHED,
    add_path_to_errors,
    atomic_open,
    atomic_write,
    sync_file,
    sync_folder,
)
from moma.vocabulary import Vocabulary

_ORIGIN_FILE = "origin.json"
# Every file that moma writes into the folder of a source.
_OWN_FILE = re.compile(
    rf"({'|'.join(map(re.escape, (_ORIGIN_FILE, INFO_FILE, VOCABULARY_FILE, REJECTED_FILE)))}"
    rf"|part-\d+\.json|rejected-\d+\.jsonl|({'|'.join(SPLITS)})-\d+\.arrow)"
    rf"({re.escape(UNFINISHED)})?"
)


class PartialShards:
    """The shards of one source while they are written; continues what an earlier process left.

    Attributes:
        info: what is on disk so far.
        folder: where the finished shards go.
        vocabulary: the ids.
    """

    def __init__(self, folder: Path, origin: ShardInfo, vocabulary: Vocabulary) -> None:
        """Find the committed parts, and delete everything else.

        Args:
            folder: where the finished shards go.
            origin: what the shards are made from, without parts; parts of another origin are
                deleted.
            vocabulary: the ids.

        Raises:
            UserError: a folder that would be replaced has files that moma did not write.
        """
        self.folder = folder
        self.path = partial_folder(folder)
        self.vocabulary = vocabulary
        for replaced in (folder, self.path, _old_folder(folder)):
            _require_own(replaced)
        if read_config(ShardInfo, self.path / _ORIGIN_FILE) != origin:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            atomic_write(self.path / _ORIGIN_FILE, origin.model_dump_json() + "\n")
        self.info = origin
        self._keep(list(self._committed()))

    def begin_part(self) -> "PartWriter":
        """Begin the part after the last one."""
        return PartWriter(self.path, self.info, shard_features(self.vocabulary))

    def commit(self, part: "PartWriter") -> None:
        """Commit a part: from now on, a kill does not lose it."""
        self.info = self.info.with_parts([*self.info.parts, part.commit()])

    def drop_rejected(self) -> None:
        """Delete the first part with a rejected document and all later ones."""
        rejected = [bool(part.rejected) for part in self.info.parts]
        self._keep(list(self.info.parts[: rejected.index(True)]))

    def finish(self) -> ShardInfo:
        """Put the shards in place of older ones."""
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
        kept = {_ORIGIN_FILE}
        for number in range(len(parts)):
            kept |= {_part_name(number), _rejected_name(number)}
            kept |= {file_name(split, number) for split in SPLITS}
        # Part records first, the last one before the others: committed parts stay complete.
        order = sorted(
            self.path.iterdir(),
            key=lambda path: (path.name.startswith("part-"), len(path.name), path.name),
            reverse=True,
        )
        for path in order:
            if path.name not in kept:
                path.unlink()


class PartWriter:
    """One part while it is written: a file for each split, and its rejected documents."""

    def __init__(self, folder: Path, info: ShardInfo, features: datasets.Features) -> None:
        self._folder, self._number, self._source = folder, len(info.parts), info.source
        start = info.documents_read
        self.part = Part(first=start, stop=start, counts=dict.fromkeys(SPLITS, Counts()))
        origin = {**file_origin(info), "part": self._number}
        schema = features.arrow_schema
        metadata = {**(schema.metadata or {}), METADATA_KEY: json.dumps(origin).encode()}
        self._schema = schema.with_metadata(metadata)
        self._open = ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._writers: dict[str, pa.RecordBatchStreamWriter] = {}

    def close(self) -> None:
        """Close the files; what was not committed is lost."""
        self._open.close()

    @property
    def tokens(self) -> int:
        """Number of tokens, all splits together."""
        return sum_counts(self.part.counts.values()).tokens

    @property
    def documents_read(self) -> int:
        """Number of the source's documents that the part covers, rejected ones included."""
        return self.part.stop - self.part.first

    def add(self, tables: dict[str, pa.Table], rejected: Sequence[Rejected]) -> None:
        """Write the next documents: tables of encoded ones by split, and rejected ones.

        Raises:
            OSError: they cannot be written; the error has the folder's path.
        """
        with add_path_to_errors(self._folder):
            counts = dict(self.part.counts)
            for split, table in tables.items():
                if table.num_rows:
                    metadata = self._schema.metadata
                    self._writer(split).write_table(table.replace_schema_metadata(metadata))
                    counts[split] = counts[split].plus(_count(table))
            if rejected:
                file = self._file(_rejected_name(self._number))
                file.writelines(rejected_line(self._source, row) for row in rejected)
                file.flush()  # they may be read before the part ends
        read = sum(table.num_rows for table in tables.values()) + len(rejected)
        self.part = Part(
            first=self.part.first,
            stop=self.part.stop + read,
            counts=counts,
            rejected=self.part.rejected + len(rejected),
        )

    def commit(self) -> Part:
        """Sync the files, rename them, and write the part's record."""
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
    """Return the shards of a source if they are complete and of this origin, else None."""
    partial = read_info(partial_folder(folder))
    if partial is not None and partial.same_origin(origin):
        _put_in_place(folder)  # a process was killed just before that
    found = read_info(folder)
    if found is None or not found.same_origin(origin):
        return None
    for leftover in (partial_folder(folder), _old_folder(folder)):
        _require_own(leftover)
        shutil.rmtree(leftover, ignore_errors=True)
    return found


def _require_own(folder: Path) -> None:
    """Refuse to replace or delete a folder with files that moma did not write."""
    if not folder.exists():
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    foreign = next((name for name in names if not _OWN_FILE.fullmatch(name)), None)
    if foreign is not None:
        raise UserError(
            f"{folder}: has to be replaced, but moma did not write '{foreign}' there; move it away"
        )


def _put_in_place(folder: Path) -> None:
    """Rename finished shards to their folder; if killed at any step, it is done again."""
    partial, old = partial_folder(folder), _old_folder(folder)
    for replaced in (folder, old):
        _require_own(replaced)
    for pattern in ("part-*.json", "rejected-*.jsonl", _ORIGIN_FILE):
        for path in partial.glob(pattern):
            path.unlink()
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_rejected(folder: Path, out: BinaryIO) -> None:
    """Append the rejected documents of a source to a file, an unfinished part's included."""
    for path in _rejected_files(folder):
        with path.open("rb") as file:
            shutil.copyfileobj(file, out)


def rejected_line(source: str, rejected: Rejected) -> bytes:
    """Return a line of `rejected.jsonl`."""
    values = {"source": source, "row": rejected.row, "reason": rejected.reason}
    return json.dumps(values).encode() + b"\n"


def first_rejected(folder: Path) -> Rejected:
    """Return the first rejected document of a source that has one."""
    with next(path for path in _rejected_files(folder)).open("rb") as file:
        values = json.loads(file.readline())
    return Rejected(values["row"], values["reason"])


def partial_folder(folder: Path) -> Path:
    """Return the folder of a source's shards while they are written."""
    return folder.with_name(folder.name + ".partial")


def _old_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _rejected_files(folder: Path) -> list[Path]:
    partial = partial_folder(folder)
    if not partial.exists():
        return [path for path in [folder / REJECTED_FILE] if path.exists()]
    paths = partial.glob("rejected-*.jsonl*")
    return sorted(paths, key=lambda path: int(path.name.split("-")[1].split(".")[0]))


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
