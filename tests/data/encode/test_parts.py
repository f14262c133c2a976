"""Unfinished shards: encoding that is killed before any step ends with the same bytes."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from moma.data.documents import Document, Rejected, SourcePart
from moma.data.encode import chunks, part_writer, parts
from moma.data.shards import PartRecord, ShardInfo, open_shards
from moma.data.sources.parts import PART_BYTES
from tests.data.encode.encoding import encode_source
from tests.factories import ListSource, make_vocabulary

VOCABULARY = make_vocabulary(300)


class Killed(BaseException):
    """Simulates a kill: no `except Exception` stops it."""


# Every seventh is rejected.
ROWS = [
    Rejected(f"row {n}", "bad")
    if n % 7 == 3
    else Document(f"doc {n}", (str(n),), held_out=n % 5 == 4)
    for n in range(20)
]


class Texts:
    """Encodes the texts of `ROWS` and records them."""

    def __init__(self):
        self.seen = []

    def __call__(self, texts):
        self.seen += texts
        return [[100 + int(text)] for text in texts]


def run(folder, texts=None, name="rows"):
    source, limits = ListSource(*ROWS, name=name), {"shard_tokens": 20, "max_rejected": 1}
    return encode_source(source, texts or Texts(), None, VOCABULARY, 0, folder, **limits)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def small_chunks_and_a_fast_disk(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(os, "fsync", lambda file: None)


class Steps:
    """Counts the operations that change the disk, and kills before a given one."""

    def __init__(self, patch, kill_at=None):
        self.done, self.kill_at = 0, kill_at
        for owner, name in [
            (os, "replace"),
            (os, "fsync"),
            (Path, "unlink"),
            (Path, "rename"),
            (Path, "write_text"),
            (shutil, "rmtree"),
            (part_writer.PartWriter, "add"),
        ]:
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, step):
        def counted(*arguments, **options):
            if self.done == self.kill_at:
                raise Killed
            self.done += 1
            return step(*arguments, **options)

        return counted


@pytest.mark.parametrize(
    ("before", "steps_to_try"),
    [
        ("nothing", slice(None)),
        ("other shards", slice(-20, None)),  # the last steps put them out of the way
        ("half of others", slice(10)),  # the first steps delete it
    ],
)
def test_a_kill_before_any_step_changes_no_byte(tmp_path, before, steps_to_try):
    def start(folder):
        if before == "other shards":
            run(folder, name="older")
        if before == "half of others":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                Steps(patch, 30)
                run(folder, name="older")
        return folder

    with pytest.MonkeyPatch.context() as patch:
        folder = start(tmp_path / "undisturbed" / "shard")
        steps = Steps(patch)
        expected_info = run(folder)
    expected = contents(tmp_path / "undisturbed")
    assert expected.keys() >= {"shard/shard.json", "shard/rejected.jsonl"}
    assert steps.done > 40
    for kill_at in range(steps.done)[steps_to_try]:
        folder = start(tmp_path / str(kill_at) / "shard")
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, kill_at)
            with pytest.raises(Killed):
                run(folder)
        assert run(folder) == expected_info
        assert contents(folder.parent) == expected
        shutil.rmtree(folder.parent)


def test_two_kills_change_no_byte(tmp_path):
    run(tmp_path / "undisturbed" / "shard")
    for first, second in [(5, 2), (20, 20), (30, 11), (42, 3), (43, 4)]:
        folder = tmp_path / f"{first} {second}" / "shard"
        for kill_at in (first, second):
            with pytest.MonkeyPatch.context() as patch:
                Steps(patch, kill_at)
                with pytest.raises(Killed):
                    run(folder)
        run(folder)
        assert contents(folder.parent) == contents(tmp_path / "undisturbed")


def test_finished_parts_are_not_encoded_again(tmp_path):
    whole, first, second = Texts(), Texts(), Texts()
    info = run(tmp_path / "undisturbed", whole)
    folder = tmp_path / "shard"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Steps(patch, 35)
        run(folder, first)
    committed = len(list((tmp_path / "shard.partial").glob("part-*.json")))
    assert 0 < committed < len(info.parts)
    assert run(folder, second) == info
    rows = [str(number) for number in range(20) if number % 7 != 3]
    assert whole.seen == rows
    assert second.seen == [row for row in rows if int(row) >= info.parts[committed - 1].stop]


def test_every_rejected_row_is_listed_once(tmp_path):
    info = run(tmp_path / "shard")
    lines = [json.loads(line) for line in (tmp_path / "shard/rejected.jsonl").open()]
    assert [line["row"] for line in lines] == [f"row {number}" for number in (3, 10, 17)]
    assert info.rejected == 3
    assert sum(part.rejected for part in info.parts) == 3
    assert len(info.parts) == 3
    names = [
        encoded.name(row)
        for encoded in open_shards(tmp_path / "shard", VOCABULARY).splits.values()
        for row in range(len(encoded))
    ]
    expected = {f"doc {number}" for number in range(20) if number % 7 != 3}
    assert len(names) == len(expected) and set(names) == expected


def test_a_truncated_record_is_ignored(tmp_path):
    """After a power cut on a file system that keeps names before contents."""
    expected = run(tmp_path / "undisturbed")
    folder = tmp_path / "shard"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Steps(patch, 45)
        run(folder)
    last = sorted((tmp_path / "shard.partial").glob("part-*.json"))[-1]
    last.write_bytes(last.read_bytes()[:20])
    assert run(folder) == expected
    assert contents(folder) == contents(tmp_path / "undisturbed")


def one_part(part_bytes):
    return [SourcePart()]


def test_rejected_rows_of_a_process_that_died_are_listed_once(tmp_path):
    """Another process has begun its part again; nothing is deleted in between."""
    origin = ShardInfo(source="rows", source_fingerprint="", vocabulary_fingerprint="")
    made = parts.PartialShards(tmp_path / "rows", origin, 1, one_part)
    rows = [Rejected(f"row {number}", "bad") for number in range(3)]
    for written in (rows[:2], rows[:1]):
        died = part_writer.PartWriter(made.path, origin, 0, 0, 0, pa.schema([]))
        died.add({}, written)
        died.close()
        assert [*parts.read_rejected(made.folder)] == rows[:2]
    writer = part_writer.PartWriter(made.path, origin, 0, 0, 0, pa.schema([]))
    writer.add({}, rows)
    made.add(0, [writer.commit(is_last=True)])
    assert [*parts.read_rejected(made.folder)] == rows
    made.finish(VOCABULARY)
    assert [*parts.read_rejected(made.folder)] == rows


def test_another_size_of_parts_cuts_the_source_again(tmp_path):
    origin = ShardInfo(source="rows", source_fingerprint="", vocabulary_fingerprint="")

    def cut(part_bytes):
        return [SourcePart(begin=0, end=part_bytes)]

    for part_bytes in (1, 2, 2):
        made = parts.PartialShards(tmp_path / "rows", origin, part_bytes, cut)
        assert [*made.plan] == cut(part_bytes)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train-00000-00001.arrow", "rejected.jsonl"])
def test_verifying_may_be_killed_at_any_step(tmp_path, name):
    """Either nothing has happened, or all that is damaged is made again."""
    expected_info = run(tmp_path / "undisturbed" / "shard")
    expected = contents(tmp_path / "undisturbed")
    origin, outcomes = expected_info.with_parts(()), set()
    for kill_at in range(60):
        folder = tmp_path / str(kill_at) / "shard"
        shutil.copytree(tmp_path / "undisturbed" / "shard", folder)
        damage(folder / name)
        before = contents(folder.parent)
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, kill_at)
            with contextlib.suppress(Killed):
                assert parts.complete_shards(folder, origin, verify=True) is None
        assert run(folder) == expected_info
        found = contents(folder.parent)
        assert found in (before, expected)
        outcomes.add(found == expected)
        if steps.done < kill_at:
            assert outcomes == {False, True}
            return
    pytest.fail("verifying never ended")


def test_a_missing_list_of_rejected_rows_is_made_again(tmp_path):
    info = run(tmp_path / "undisturbed")
    run(tmp_path / "shard")
    (tmp_path / "shard/rejected.jsonl").unlink()
    assert parts.complete_shards(tmp_path / "shard", info.with_parts(()), verify=True) is None
    run(tmp_path / "shard")
    assert contents(tmp_path / "shard") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("is_missing", [True, False])
def test_unfinished_rejected_rows_that_are_damaged_are_read_again(tmp_path, is_missing):
    expected = run(tmp_path / "undisturbed")
    folder = tmp_path / "shard"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Steps(patch, 45)
        run(folder)
    rejected = tmp_path / "shard.partial/rejected-00000-00000.jsonl"
    if is_missing:
        rejected.unlink()
    else:
        rejected.write_text("")
    shards = parts.PartialShards(folder, expected.with_parts(()), PART_BYTES, one_part)
    committed = len(shards.parts[0])
    assert (committed == 0) == is_missing and shards.drop_damaged() == committed
    assert run(folder) == expected
    assert contents(folder) == contents(tmp_path / "undisturbed")


def test_dropping_rejected_rows_may_be_killed_at_any_step(tmp_path):
    origin = ShardInfo(source="rows", source_fingerprint="", vocabulary_fingerprint="")
    for kill_at in range(40):
        folder = tmp_path / str(kill_at)
        made = parts.PartialShards(folder, origin, 1, one_part)
        records = []
        for number in range(3):
            writer = part_writer.PartWriter(made.path, origin, 0, number, number, pa.schema([]))
            writer.add({}, [Rejected(f"row {number}", "bad")] if number else [])
            records.append(writer.commit(is_last=number == 2))
        made.add(0, records)
        with pytest.MonkeyPatch.context() as patch:
            Steps(patch, kill_at)
            try:
                made.drop_rejected()
            except Killed:
                killed = True
            else:
                killed = False
        again = parts.PartialShards(folder, origin, 1, one_part)
        for record in again.parts[0]:
            names = {path.name for path in again.path.iterdir()}
            assert (f"rejected-{record.name}.jsonl" in names) == (record.rejected > 0)
        if not killed:
            assert len(again.parts[0]) == 1
            return
    pytest.fail("dropping never ended")


@pytest.mark.parametrize("changes", [{0: {"is_last": True}}, {0: {"stop": 3}}])
def test_older_records_of_a_part_do_not_follow_newer_ones(tmp_path, changes):
    records = [
        PartRecord(part=0, file=n, first=2 * n, stop=2 * n + 2, is_last=n == 2) for n in range(3)
    ]
    for number, record in enumerate(records):
        record = record.model_copy(update=changes.get(number, {}))
        (tmp_path / part_writer.record_name(0, number)).write_text(record.model_dump_json())
    assert [record.file for record in part_writer.read_records(tmp_path, 0)] == [0]
