"""Machines that make parts of one source at an address, and make some of them again."""

from pathlib import Path
from typing import ClassVar

import pytest

from moma.data.documents import Document, Rejected, SourceConfig, SourcePart
from moma.data.encode.existing import fetch_begun
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.source import SourceEncoding
from moma.data.encode.tokens import Encoder
from moma.data.encode.upload import Remote
from moma.data.remote.reading import read_link
from moma.data.remote.storage import Storage
from moma.data.shards import open_shards
from moma.errors import UserError
from tests.data.encode.encoding import VOCABULARY, encode_text, rejected_in, to_rgb
from tests.data.remote.test_training import memory

ADDRESS = "ram://bucket/again"
PARTS, ROWS = 4, 10
ALL = {f"row {number}" for number in range(PARTS * ROWS)}


class Rows(SourceConfig):
    """Parts of ten rows; some cannot be used now, which no fingerprint shows."""

    unreadable: ClassVar[set[int]] = set()
    name: str = "rows"

    def parts(self, part_bytes):
        return [SourcePart(first=number, stop=number + 1) for number in range(PARTS)]

    def read_part(self, part):
        for number in range(part.first * ROWS, part.stop * ROWS):
            name = f"row {number}"
            is_bad = number in self.unreadable
            yield Rejected(name, "bad") if is_bad else Document(name, (f"text {number}",))


class Machine:
    """Makes every second part."""

    def __init__(self, path: Path, share: int, max_rejected: float) -> None:
        self.path, self.folder, self.share = path, path / "shards/rows", share
        self.max_rejected = max_rejected

    def is_own(self, number):
        return number % 2 == self.share

    def begin(self, address=ADDRESS):
        remote = Remote(address, 2**30, self.path) if address else None
        self.encoding = SourceEncoding(
            Rows(),
            VOCABULARY,
            0,
            self.folder,
            shard_tokens=20,
            max_rejected=self.max_rejected,
            remote=remote,
        )
        self.shards = self.encoding.begin(is_own=self.is_own)

    def encode(self):
        """Make the own parts."""
        reader = ImageReader(to_rgb, workers=0)
        with Encoder(encode_text, None, VOCABULARY, True) as encoder:
            for number in self.shards.own_pending:
                part = self.shards.plan[number]
                records = self.encoding.encode_part(number, part, encoder, reader)
                self.encoding.add(self.shards, number, records)

    def end(self):
        """Make the own parts, and publish them all; None if some are missing."""
        self.encode()
        self.shards.refresh()
        if self.shards.pending:
            return None
        info = self.encoding.finish(self.shards)
        assert self.encoding.remote is not None
        upload = self.encoding.remote.connect_complete(self.folder, "rows")
        upload.publish("rows", self.folder, info)
        return memory()["/bucket/again/sources/rows.json"].getvalue()

    def run(self):
        self.begin()
        return self.end()

    def names(self):
        """Return the names of the documents of the complete shards."""
        encoded = open_shards(self.folder, VOCABULARY).splits["train"]
        names = [encoded.name(number) for number in range(len(encoded))]
        assert len({*names}) == len(names)
        return {*names}


@pytest.fixture
def machines(tmp_path):
    memory().clear()
    yield lambda limit: [Machine(tmp_path / str(share), share, limit) for share in (0, 1)]
    Rows.unreadable = set()


def run_again_together(first, second):
    """Repair the rows for which the second machine is refused; return what the first publishes."""
    unreadable = len(Rows.unreadable)
    assert first.run() is None
    with pytest.raises(UserError, match=f"{unreadable} of 40 documents were rejected"):
        second.run()
    Rows.unreadable = set()
    first.begin()
    second.begin()
    assert second.end() is None
    return first.end()


def test_both_machines_make_their_rejected_rows_again_at_the_same_time(machines):
    first, second = machines(0.1)
    Rows.unreadable = {1, 2, 3, 24, 11, 12, 13, 34}
    published = run_again_together(first, second)
    assert first.names() == ALL and not rejected_in(first.folder)
    assert second.run() == published and second.names() == ALL


def test_what_another_machine_made_again_replaces_what_was_fetched(machines):
    first, second = machines(0.07)
    Rows.unreadable = {1, 11, 31}
    # The first removes one of the three, so that the others are within the second's limit.
    published = run_again_together(first, second)
    for machine in (first, second):
        assert machine.run() == published
        assert machine.names() == ALL - {"row 11", "row 31"}
        assert len(rejected_in(machine.folder)) == 2


def test_a_part_made_without_the_address_gives_way_to_the_one_there(machines):
    first, second = machines(0.1)
    Rows.unreadable = {1, 22}
    first.begin(address=None)
    first.encode()
    Rows.unreadable = set()
    second.share = 0
    assert second.run() is None
    second.share = 1
    assert second.run() is not None
    first.run()
    assert first.names() == second.names() == ALL


def test_a_record_that_is_removed_while_records_are_fetched_is_missing(machines, monkeypatch):
    first, second = machines(0.1)
    first.run()
    sizes = Storage.sizes
    removed: list[str] = []

    def remove_one(self, folder):
        found = sizes(self, folder)
        if not removed:
            removed.append(next(name for name in found if "/part-" in name))
            self.remove(removed)
        return found

    second.begin()
    assert second.shards.pending == [1, 3]
    monkeypatch.setattr(Storage, "sizes", remove_one)
    second.begin()
    assert removed and second.shards.pending == [0, 1, 3]


def test_of_a_part_the_last_record_is_removed_first(machines, monkeypatch):
    """If killed in between, no record is left without those before it."""
    first, _ = machines(0.01)
    Rows.unreadable = {1, 21}
    assert first.run() is None
    remove = Storage.remove
    removed: list[str] = []

    def note(self, names):
        removed.extend(name[-10:-5] for name in names if "/part-00002" in name)
        remove(self, names)

    monkeypatch.setattr(Storage, "remove", note)
    first.begin()
    assert len(removed) > 1 and removed == sorted(removed, reverse=True)


def test_parts_made_from_other_files_are_found_until_they_are_published(machines, monkeypatch):
    first, second = machines(0.1)
    first.run()
    assert not first.shards.unpublished_folders()
    monkeypatch.setattr(Rows, "fingerprint", lambda self: "copied")
    second.begin()
    (found,) = second.shards.unpublished_folders()
    assert found in next(name for name in memory() if "/part-" in name)
    # Those of an older version that is complete are not meant.
    first.share = 1
    monkeypatch.setattr(Rows, "fingerprint", lambda self: "")
    assert first.run() is not None
    assert not second.shards.unpublished_folders()


def test_rejected_documents_are_not_fetched_to_be_counted(machines, tmp_path):
    first, _ = machines(0.1)
    Rows.unreadable = {1, 24}
    first.run()
    link = read_link(first.shards.path)
    assert link is not None
    fetch_begun(link, tmp_path / "seen", "rows", VOCABULARY)
    found = tmp_path / "seen/shards/rows.partial"
    assert len([*found.glob("part-*")]) == len([*first.shards.path.glob("part-*")]) > 2
    assert [*first.shards.path.glob("rejected-*")] and not [*found.glob("rejected-*")]
