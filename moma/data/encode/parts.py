"""Encoded files of a source while they are written: a kill at any time loses nothing.

    SOURCE.partial/  origin.json   what they are made from
                     plan.json     the parts that the source is cut into
                     train-00012-00003.arrow, …, and then their record `part-00012-00003.json`
                     → shard.json, rejected.jsonl → renamed to SOURCE/

The files of a part depend on that part alone, so that processes can encode parts in any order. They
are written under temporary names, synced to disk and renamed; they are committed once their record
exists, and the part is complete once its last record exists. The next process keeps what is
committed, deletes the rest, and continues.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import pyarrow as pa

from moma.data.documents import Rejected, SourcePart
from moma.data.encode.rejected import parse_rejected_line, rejected_line
from moma.data.shards import (
    INFO_FILE,
    METADATA_KEY,
    ORIGIN_FILE,
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
)
from moma.errors import UserError
from moma.files import (
    UNFINISHED,
    add_path_to_errors,
    atomic_open,
    atomic_write,
    checksum,
    sync_file,
    sync_folder,
)
from moma.recipe import Config
from moma.vocabulary import Vocabulary

_PLAN_FILE = "plan.json"
_KEPT_FILES = (ORIGIN_FILE, _PLAN_FILE)
# Every file that moma writes into the folder of a source; the last alternative is of older data.
_OWN_FILE = re.compile(
    rf"({'|'.join(map(re.escape, (*_KEPT_FILES, INFO_FILE, VOCABULARY_FILE, REJECTED_FILE)))}"
    rf"|(part|rejected|{'|'.join(SPLITS)})-\d+(-\d+)?\.(json|jsonl|arrow))"
    rf"(\.[0-9a-f]+)?({re.escape(UNFINISHED)})?"
)


class Plan(Config):
    """The parts that a source is cut into.

    Attributes:
        part_bytes: `data.part_bytes`.
        parts: the parts, in the order of the documents.
    """

    part_bytes: int
    parts: tuple[SourcePart, ...]


class PartialShards:
    """The files of one source while they are written; continues what an earlier process left.

    Attributes:
        plan: the parts of the source.
        parts: what is committed of each part, by its number.
        complete: the complete parts as one.
        beginning: what precedes the first part that is not complete, as one.
    """

    def __init__(
        self,
        folder: Path,
        origin: ShardInfo,
        part_bytes: int,
        cut: Callable[[int], list[SourcePart]],
    ) -> None:
        """Find what is committed, and delete everything else.

        Args:
            origin: what the files are made from, without parts; those of another origin are
                deleted.
            part_bytes: approximate size of a part; files that were made with another are deleted.
            cut: cuts the source into parts of that size.

        Raises:
            UserError: a folder that would be replaced has files that moma did not write.
        """
        self.folder, self.path, self.origin = folder, partial_folder(folder), origin
        _require_own(folder, self.path, _old_folder(folder))
        plan = read_config(Plan, self.path / _PLAN_FILE)
        found = read_config(ShardInfo, self.path / ORIGIN_FILE)
        if plan is None or plan.part_bytes != part_bytes or found != origin:
            plan = Plan(part_bytes=part_bytes, parts=tuple(cut(part_bytes)))
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            atomic_write(self.path / _PLAN_FILE, plan.model_dump_json() + "\n")
            atomic_write(self.path / ORIGIN_FILE, origin.model_dump_json() + "\n")
        self.plan = plan.parts
        self._keep({number: read_records(self.path, number) for number in range(len(self.plan))})

    @property
    def pending(self) -> list[int]:
        """Numbers of the parts that are not complete."""
        return [number for number in range(len(self.plan)) if not self._is_complete(number)]

    @property
    def done(self) -> Part:
        """Everything that is committed, as one."""
        return sum((sum(records, Part()) for records in self.parts.values()), Part())

    def add(self, number: int, records: Sequence[Part]) -> None:
        """Note that a part is complete, with these records."""
        self.parts[number] = [*records]
        self.complete += sum(records, Part())
        self._extend_beginning()

    def drop_rejected(self) -> None:
        """Delete, of each part, the first files with a rejected document and all later ones."""
        self._keep(
            {
                number: [*takewhile(lambda record: not record.rejected, records)]
                for number, records in self.parts.items()
            }
        )

    def drop_damaged(self) -> int:
        """Delete files with a wrong size or checksum, and later ones of their part; count them."""
        kept = {
            number: [*takewhile(partial(is_intact, self.path), records)]
            for number, records in self.parts.items()
        }
        damaged = sum(map(len, self.parts.values())) - sum(map(len, kept.values()))
        self._keep(kept)
        return damaged

    def finish(self, vocabulary: Vocabulary) -> ShardInfo:
        """Put the files in place of older ones."""
        with atomic_open(self.path / REJECTED_FILE) as all_rejected:
            copy_rejected(self.folder, all_rejected)
        vocabulary.save(self.path / VOCABULARY_FILE)
        records = (record for number in range(len(self.plan)) for record in self.parts[number])
        info = self.origin.with_parts([record for record in records if record.documents_read])
        atomic_write(self.path / INFO_FILE, info.model_dump_json(indent=2) + "\n")
        _put_in_place(self.folder)
        return info

    def _extend_beginning(self) -> None:
        while self._beginning_parts < len(self.plan) and self._is_complete(self._beginning_parts):
            self.beginning += sum(self.parts[self._beginning_parts], Part())
            self._beginning_parts += 1

    def _is_complete(self, number: int) -> bool:
        records = self.parts[number]
        return bool(records) and records[-1].is_last

    def _keep(self, parts: dict[int, list[Part]]) -> None:
        """Delete everything that does not belong to these records."""
        self.parts = parts
        complete = filter(self._is_complete, parts)
        self.complete = sum((sum(parts[number], Part()) for number in complete), Part())
        self.beginning, self._beginning_parts = Part(), 0
        self._extend_beginning()
        names = {record.name for records in parts.values() for record in records}
        files = [path for path in self.path.iterdir() if path.name not in _KEPT_FILES]
        # Records first, the last one before the others: what they name stays complete.
        files.sort(key=lambda path: (path.suffix == ".json", _numbers_in(path)), reverse=True)
        for path in files:
            if path.name.endswith(UNFINISHED) or _name_in(path) not in names:
                path.unlink()


class PartWriter:
    """Files of a part while they are written: one for each split, and rejected documents.

    Attributes:
        record: what was added so far.
    """

    def __init__(
        self, folder: Path, info: ShardInfo, part: int, file: int, first: int, schema: pa.Schema
    ) -> None:
        """Write no file yet.

        Args:
            part, file: number of the part, and of the files among those of the part.
            first: number of documents of the part before.
        """
        self._folder, self._source = folder, info.source
        self.record = Part(part=part, file=file, first=first, stop=first)
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
                file = self._file(f"rejected-{self.record.name}.jsonl")
                file.writelines(rejected_line(self._source, row) for row in listed)
                file.flush()  # they may be read before the files are committed
        counts = dict.fromkeys(SPLITS, Counts())
        counts |= {split: _count(table) for split, table in tables.items()}
        read = sum(count.documents for count in counts.values()) + len(rejected)
        dropped = Counter(row.dropped_by for row in rejected)
        unusable = dropped.pop("", 0)
        own = self.record
        self.record = own + Part(
            stop=read,
            counts=counts,
            rejected=unusable,
            dropped=dropped,
            dropped_images=Counter(image.dropped_by for image in dropped_images),
        )
        self.record = self.record.model_copy(update={"part": own.part, "file": own.file})

    def commit(self, is_last: bool) -> Part:
        """Sync the files, rename them, and write their record: a kill does not lose them now."""
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
        text = self.record.model_dump_json() + "\n"
        atomic_write(self._folder / _record_name(self.record.part, self.record.file), text)
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


def read_records(folder: Path, part: int) -> list[Part]:
    """Return what is committed of a part in a folder of partial files."""
    records: list[Part] = []
    while record := read_config(Part, folder / _record_name(part, len(records))):
        records.append(record)
    return records


def complete_shards(folder: Path, origin: ShardInfo, verify: bool = False) -> ShardInfo | None:
    """Return the shards of a source if they are complete and of this origin, else None.

    Args:
        verify: whether to compare checksums; where one is wrong, the shards become partial ones.
    """
    finished = read_info(partial_folder(folder))
    if finished is not None and finished.same_origin(origin):
        _put_in_place(folder)  # a process was killed just before that
    found = read_info(folder)
    if found is None or not found.same_origin(origin):
        return None
    leftovers = partial_folder(folder), _old_folder(folder)
    _require_own(*leftovers)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    if verify and not all(is_intact(folder, record) for record in found.parts):
        _make_partial(folder, found)
        return None
    return found


def is_intact(folder: Path, record: Part) -> bool:
    """Return whether the files of a record have its sizes and checksums."""
    try:
        return all(
            checksum(folder / name) == expected
            for name, expected in record.checksums.items()
            if (folder / name).exists() or not name.startswith("rejected-")
        )
    except OSError:
        return False


def _make_partial(folder: Path, info: ShardInfo) -> None:
    """Undo `PartialShards.finish`; if killed before its end, it has not happened."""
    path = partial_folder(folder)
    folder.rename(path)
    with (path / REJECTED_FILE).open("rb") as rejected:
        for record in info.parts:
            name = f"rejected-{record.name}.jsonl"
            if name in record.checksums:
                (path / name).write_bytes(rejected.read(record.checksums[name][0]))
            text = record.model_dump_json() + "\n"
            (path / _record_name(record.part, record.file)).write_text(text)
    (path / ORIGIN_FILE).write_text(info.with_parts(()).model_dump_json() + "\n")
    for name in (REJECTED_FILE, VOCABULARY_FILE, INFO_FILE):
        (path / name).unlink()


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
    unfinished, old = partial_folder(folder), _old_folder(folder)
    _require_own(folder, old)
    for pattern in ("part-*.json", "rejected-*.jsonl", ORIGIN_FILE, f"*{UNFINISHED}"):
        for path in unfinished.glob(pattern):
            path.unlink()
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
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
    unfinished = partial_folder(folder)
    if not unfinished.exists():
        return [*folder.glob(REJECTED_FILE)]
    return sorted(unfinished.glob("rejected-*.jsonl*"), key=_numbers_in)


def _record_name(part: int | None, file: int) -> str:
    return f"part-{Part(part=part, file=file).name}.json"


def _name_in(path: Path) -> str:
    """Return the name of the record that a file belongs to; empty for one of the whole source."""
    found = re.search(r"-(\d+-\d+)\.", path.name)
    return found[1] if found else ""


def _numbers_in(path: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", _name_in(path))))


def _count(table: pa.Table) -> Counts:
    return Counts(
        documents=table.num_rows,
        tokens=len(table.column("ids").combine_chunks().flatten()),
        images=int(np.sum(table.column("images").to_numpy())),
    )
