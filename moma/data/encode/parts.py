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

import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from hashlib import sha256
from io import BytesIO
from itertools import chain, takewhile
from pathlib import Path
from typing import BinaryIO

from moma.data.documents import Rejected, SourcePart
from moma.data.encode.part_writer import read_records, record_name, rejected_name
from moma.data.encode.rejected import parse_rejected_line
from moma.data.encode.upload import SourceUpload, forget
from moma.data.remote.reading import LINK_FILE, read_link
from moma.data.shards import (
    INFO_FILE,
    ORIGIN_FILE,
    PLAN_FILE,
    REJECTED_FILE,
    VOCABULARY_FILE,
    PartRecord,
    ShardInfo,
    read_config,
    read_info,
    require_own,
)
from moma.files import (
    UNFINISHED,
    atomic_open,
    atomic_write,
    checksum,
    sync_folder,
)
from moma.recipe import Config
from moma.vocabulary import Vocabulary

_EMPTY = sha256().hexdigest()
_KEPT_FILES = (ORIGIN_FILE, PLAN_FILE, LINK_FILE)


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
        connect: Callable[[Path], SourceUpload | None] = lambda path: None,
        is_own: Callable[[int], bool] = lambda number: True,
    ) -> None:
        """Find what is committed, and delete everything else.

        Args:
            origin: what the files are made from, without parts; those of another origin are
                deleted.
            part_bytes: approximate size of a part; files that were made with another are deleted.
            cut: cuts the source into parts of that size.
            connect: folder of partial files → where they are uploaded.
            is_own: whether a part, by its number, is encoded here and not on another machine, of
                whose parts those at the address count.

        Raises:
            UserError: a folder that would be replaced has files that moma did not write.
        """
        self.folder, self.path, self.origin = folder, partial_folder(folder), origin
        require_own(folder, self.path, _old_folder(folder))
        plan = read_config(Plan, self.path / PLAN_FILE)
        found = read_config(ShardInfo, self.path / ORIGIN_FILE)
        if plan is None or plan.part_bytes != part_bytes or found != origin:
            plan = Plan(part_bytes=part_bytes, parts=tuple(cut(part_bytes)))
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            atomic_write(self.path / PLAN_FILE, plan.model_dump_json() + "\n")
            atomic_write(self.path / ORIGIN_FILE, origin.model_dump_json() + "\n")
        self.plan = plan.parts
        self._is_own = is_own
        self._remote = connect(self.path)
        self.refresh()
        if self._remote is not None:
            self._remote.upload_missing(self.path, chain(*self.parts.values()))

    @property
    def pending(self) -> list[int]:
        """Numbers of the parts that are not complete."""
        return [number for number in range(len(self.plan)) if not self._is_complete(number)]

    @property
    def own_pending(self) -> list[int]:
        """Numbers of the parts that are still to be encoded here."""
        return [*filter(self._is_own, self.pending)]

    @property
    def done(self) -> PartRecord:
        """Everything that is committed, as one."""
        return sum((sum(records, PartRecord()) for records in self.parts.values()), PartRecord())

    @property
    def info(self) -> ShardInfo:
        """The origin with everything that is committed."""
        records = [record for number in range(len(self.plan)) for record in self.parts[number]]
        return self.origin.with_parts([record for record in records if record.documents_read])

    def add(self, number: int, records: Sequence[PartRecord]) -> None:
        """Note that a part is complete, with these records."""
        self.parts[number] = [*records]
        self.complete += sum(records, PartRecord())
        self._extend_beginning()

    def unpublished_folders(self) -> list[str]:
        """Return where parts of the source are uploaded that were made from other keys or files."""
        return self._remote.unpublished_folders() if self._remote is not None else []

    def drop_rejected(self) -> None:
        """Delete, of each part, the first files with a rejected document and all later ones.

        Those of other machines stay at the address, where `refresh` finds what they are then.
        """
        self._drop(
            {
                number: [*takewhile(lambda record: not record.rejected, records)]
                for number, records in self.parts.items()
            },
            self._is_own,
        )

    def drop_damaged(self) -> int:
        """Delete files with a wrong size or checksum, and later ones of their part; count them."""
        kept = {
            number: [*takewhile(partial(is_intact, self.path), records)]
            for number, records in self.parts.items()
        }
        damaged = sum(map(len, self.parts.values())) - sum(map(len, kept.values()))
        self._drop(kept, lambda number: True)
        return damaged

    def finish(self, vocabulary: Vocabulary) -> ShardInfo:
        """Put the files in place of older ones."""
        info = self.info
        with atomic_open(self.path / REJECTED_FILE) as all_rejected:
            # Those alone that are committed: a process that died left others.
            names = (rejected_name(record) for record in info.parts if _has_rejected(record))
            _copy((self.path / name for name in names), all_rejected)
        vocabulary.save(self.path / VOCABULARY_FILE)
        atomic_write(self.path / INFO_FILE, info.model_dump_json(indent=2) + "\n")
        _put_in_place(self.folder)
        return info

    def refresh(self) -> None:
        """Read what is committed, here and meanwhile at the address, and delete everything else."""
        if self._remote is not None:
            self._remote.fetch_records(self.path)
        counts = partial(self._counts, {path.name for path in self.path.iterdir()})
        numbers = range(len(self.plan))
        self._keep(
            {number: [*takewhile(counts, read_records(self.path, number))] for number in numbers}
        )

    def _counts(self, here: Container[str], record: PartRecord) -> bool:
        """Whether the files of a record are here or at the address, and it was not removed there.

        Files that were uploaded are not, if the address is another one now, or there is none.
        """
        missing = [name for name in record.checksums if name not in here]
        if self._remote is None:
            return not missing
        is_known = self._is_own(record.part or 0) or self._remote.has_record(record)
        return is_known and (not missing or self._remote.has(record, missing))

    def _extend_beginning(self) -> None:
        while self._beginning_parts < len(self.plan) and self._is_complete(self._beginning_parts):
            self.beginning += sum(self.parts[self._beginning_parts], PartRecord())
            self._beginning_parts += 1

    def _is_complete(self, number: int) -> bool:
        records = self.parts[number]
        return bool(records) and records[-1].is_last

    def _drop(self, kept: dict[int, list[PartRecord]], is_removed: Callable[[int], bool]) -> None:
        """Delete all other records, those of the parts that are removed at the address, too."""
        if self._remote is not None:
            self._remote.forget(
                record
                for number, records in self.parts.items()
                if is_removed(number)
                for record in records[len(kept[number]) :]
            )
        self._keep(kept)

    def _keep(self, parts: dict[int, list[PartRecord]]) -> None:
        """Delete everything here that does not belong to these records."""
        self.parts = parts
        complete = filter(self._is_complete, parts)
        self.complete = sum((sum(parts[number], PartRecord()) for number in complete), PartRecord())
        self.beginning, self._beginning_parts = PartRecord(), 0
        self._extend_beginning()
        names = {record.name for records in parts.values() for record in records}
        files = [path for path in self.path.iterdir() if path.name not in _KEPT_FILES]
        # Records first, the last one before the others: what they name stays complete.
        files.sort(key=lambda path: (path.suffix == ".json", _numbers_in(path)), reverse=True)
        for path in files:
            if path.name.endswith(UNFINISHED) or _name_in(path) not in names:
                path.unlink()


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
    require_own(*leftovers)
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    if verify and len(intact := _intact_records(folder, found)) < len(found.parts):
        _make_partial(folder, found, intact)
        return None
    return found


def is_intact(folder: Path, record: PartRecord) -> bool:
    """Return whether the files of a record, here or uploaded, have its sizes and checksums."""
    link = read_link(folder)
    try:
        return all(
            checksum(folder / name) == expected
            if link is None or (folder / name).exists()
            else link.is_intact(name, expected)
            for name, expected in record.checksums.items()
        )
    except OSError:
        return False


def _intact_records(folder: Path, info: ShardInfo) -> list[PartRecord]:
    """Return the records of finished shards whose files are intact, of each part the first ones."""
    intact: list[PartRecord] = []
    damaged: set[int | None] = set()
    with _open_rejected(folder) as all_rejected:
        for record in info.parts:
            files = {**record.checksums}
            size, digest = files.pop(rejected_name(record), (0, _EMPTY))
            rejected = all_rejected.read(size)
            own = record.model_copy(update={"checksums": files})
            if sha256(rejected).hexdigest() != digest or not is_intact(folder, own):
                damaged.add(record.part)
            if record.part not in damaged:
                intact.append(record)
    return intact


def _make_partial(folder: Path, info: ShardInfo, intact: Sequence[PartRecord]) -> None:
    """Undo `PartialShards.finish`, but for what is damaged.

    If killed before the end, it has not happened.
    """
    path = partial_folder(folder)
    names = {record.name for record in intact}
    folder.rename(path)
    with _open_rejected(path) as all_rejected:
        for record in info.parts:
            rejected = all_rejected.read(record.checksums.get(rejected_name(record), (0, ""))[0])
            if record.name not in names:
                continue
            if _has_rejected(record):
                with atomic_open(path / rejected_name(record)) as file:
                    file.write(rejected)
            text = record.model_dump_json() + "\n"
            atomic_write(path / record_name(record.part, record.file), text)
    atomic_write(path / ORIGIN_FILE, info.with_parts(()).model_dump_json() + "\n")
    if (link := read_link(path)) is not None:
        forget(link, [record for record in info.parts if record.name not in names])
    # From here on it has happened; the next process deletes what else is left.
    (path / INFO_FILE).unlink()
    sync_folder(path)


def _open_rejected(folder: Path) -> BinaryIO:
    """Open the rejected documents of finished shards; empty if the file is missing."""
    path = folder / REJECTED_FILE
    return path.open("rb") if path.exists() else BytesIO()


def _put_in_place(folder: Path) -> None:
    """Rename finished shards to their folder; if killed at any step, it is done again."""
    unfinished, old = partial_folder(folder), _old_folder(folder)
    require_own(folder, old)
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
    _copy(_rejected_files(folder), out)


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
    # Of files of one record, left by processes that died, the longest has the rows of the others.
    found = sorted(unfinished.glob("rejected-*.jsonl*"), key=lambda path: path.stat().st_size)
    return sorted({_name_in(path): path for path in found}.values(), key=_numbers_in)


def _has_rejected(record: PartRecord) -> bool:
    return rejected_name(record) in record.checksums


def _copy(files: Iterable[Path], out: BinaryIO) -> None:
    for path in files:
        with path.open("rb") as file:
            shutil.copyfileobj(file, out)


def _name_in(path: Path) -> str:
    """Return the name of the record that a file belongs to; empty for one of the whole source."""
    found = re.search(r"-(\d+-\d+)\.", path.name)
    return found[1] if found else ""


def _numbers_in(path: Path) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", _name_in(path))))
