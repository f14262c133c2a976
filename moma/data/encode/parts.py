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
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from moma.data.documents import Rejected
from moma.data.encode.rejected import parse_rejected_line, rejected_line
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
        parts: the committed parts.
        done: all of them as one.
    """

    def __init__(self, folder: Path, origin: ShardInfo, vocabulary: Vocabulary) -> None:
        """Find the committed parts, and delete everything else.

        Args:
            origin: what the shards are made from, without parts; parts of another origin are
                deleted.

        Raises:
            UserError: a folder that would be replaced has files that moma did not write.
        """
        self.folder, self.path = folder, partial_folder(folder)
        self.origin, self.vocabulary = origin, vocabulary
        _require_own(folder, self.path, _old_folder(folder))
        if read_config(ShardInfo, self.path / _ORIGIN_FILE) != origin:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            atomic_write(self.path / _ORIGIN_FILE, origin.model_dump_json() + "\n")
        committed: list[Part] = []
        while part := read_config(Part, self.path / _part_name(len(committed))):
            committed.append(part)
        self._keep(committed)

    def begin_part(self) -> "PartWriter":
        """Begin the part after the last one."""
        schema = shard_features(self.vocabulary).arrow_schema
        return PartWriter(self.path, self.origin, len(self.parts), self.done.stop, schema)

    def commit(self, writer: "PartWriter") -> None:
        """Commit a part: from now on, a kill does not lose it."""
        part = writer.commit()
        self.parts.append(part)
        self.done += part

    def drop_rejected(self) -> None:
        """Delete the first part with a rejected document and all later ones."""
        self._keep([*takewhile(lambda part: not part.rejected, self.parts)])

    def finish(self) -> ShardInfo:
        """Put the shards in place of older ones."""
        with atomic_open(self.path / REJECTED_FILE) as all_rejected:
            copy_rejected(self.folder, all_rejected)
        self.vocabulary.save(self.path / VOCABULARY_FILE)
        info = self.origin.with_parts(self.parts)
        atomic_write(self.path / INFO_FILE, info.model_dump_json(indent=2) + "\n")
        _put_in_place(self.folder)
        return info

    def _keep(self, parts: list[Part]) -> None:
        """Delete everything that does not belong to these first parts."""
        self.parts, self.done = parts, sum(parts, Part())
        files = [path for path in self.path.iterdir() if path.name != _ORIGIN_FILE]
        # Part records first, the last one before the others: committed parts stay complete.
        files.sort(key=lambda path: (path.name.startswith("part-"), _number_in(path)), reverse=True)
        for path in files:
            if path.name.endswith(UNFINISHED) or _number_in(path) >= len(parts):
                path.unlink()


class PartWriter:
    """One part while it is written: a file for each split, and its rejected documents.

    Attributes:
        part: what was added so far.
    """

    def __init__(
        self, folder: Path, info: ShardInfo, number: int, first: int, schema: pa.Schema
    ) -> None:
        self._folder, self._number, self._source = folder, number, info.source
        self.part = Part(first=first, stop=first)
        origin = {**file_origin(info), "part": number}
        metadata = {**(schema.metadata or {}), METADATA_KEY: json.dumps(origin).encode()}
        self._schema = schema.with_metadata(metadata)
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
                file = self._file(f"rejected-{self._number:05}.jsonl")
                file.writelines(rejected_line(self._source, row) for row in listed)
                file.flush()  # they may be read before the part ends
        counts = dict.fromkeys(SPLITS, Counts())
        counts |= {split: _count(table) for split, table in tables.items()}
        read = sum(count.documents for count in counts.values()) + len(rejected)
        dropped = Counter(row.dropped_by for row in rejected)
        unusable = dropped.pop("", 0)
        self.part += Part(
            stop=self.part.stop + read,
            counts=counts,
            rejected=unusable,
            dropped=dropped,
            dropped_images=Counter(image.dropped_by for image in dropped_images),
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
    leftovers = partial_folder(folder), _old_folder(folder)
    _require_own(*leftovers)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    return found


def _require_own(*folders: Path) -> None:
    """Refuse to replace or delete folders with files that moma did not write."""
    for folder in filter(Path.exists, folders):
        names = sorted(os.listdir(folder)) if folder.is_dir() else [folder.name]
        foreign = next((name for name in names if not _OWN_FILE.fullmatch(name)), None)
        if foreign is not None:
            raise UserError(
                f"{folder}: has to be replaced, but moma did not write '{foreign}' there; "
                "move it away"
            )


def _put_in_place(folder: Path) -> None:
    """Rename finished shards to their folder; if killed at any step, it is done again."""
    partial, old = partial_folder(folder), _old_folder(folder)
    _require_own(folder, old)
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


def read_rejected(folder: Path) -> Iterator[Rejected]:
    """Yield the documents of a source that cannot be used, an unfinished part's included."""
    for path in _rejected_files(folder):
        with path.open("rb") as file:
            rows = map(parse_rejected_line, file)
            yield from (row for row in rows if not row.dropped_by)


def partial_folder(folder: Path) -> Path:
    """Return the folder of a source's shards while they are written."""
    return folder.with_name(folder.name + ".partial")


def _old_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _rejected_files(folder: Path) -> list[Path]:
    partial = partial_folder(folder)
    if not partial.exists():
        return [*folder.glob(REJECTED_FILE)]
    return sorted(partial.glob("rejected-*.jsonl*"), key=_number_in)


def _part_name(number: int) -> str:
    return f"part-{number:05}.json"


def _number_in(path: Path) -> int:
    """Return the part that a file belongs to; a file of the whole source belongs to no kept one."""
    number = re.search(r"-(\d+)\.", path.name)
    return int(number[1]) if number else sys.maxsize


def _count(table: pa.Table) -> Counts:
    return Counts(
        documents=table.num_rows,
        tokens=len(table.column("ids").combine_chunks().flatten()),
        images=int(np.sum(table.column("images").to_numpy())),
    )
