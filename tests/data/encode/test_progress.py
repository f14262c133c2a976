"""Progress of a job: a live table with a row for each node, or lines."""

import io
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from rich.console import Console

from moma.data.documents import SourcePart
from moma.data.encode import progress
from moma.data.encode.progress import JobProgress, show_job
from moma.data.encode.worker import Encoded, Task
from moma.data.shards import SPLITS, Counts, PartRecord


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, set by tests."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def part_of(documents):
    counts = Counts(documents=documents, tokens=100 * documents, images=2 * documents)
    return PartRecord(stop=documents, counts=dict.fromkeys(SPLITS, Counts()) | {"train": counts})


def begin(display, parts=4):
    return JobProgress(display, parts, size=parts * 1000, complete=PartRecord(), pending=parts)


def encode(job, number, documents, node="", is_last=True):
    task = Task("words", number, SourcePart(size=1000))
    job.note(Encoded(task, PartRecord()))
    records = [part_of(documents)] if is_last else None
    job.note(Encoded(task, part_of(documents), records, node))


def text_of(table):
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    return out.getvalue()


def cells(line):
    return [cell.strip() for cell in line.split("│") if cell.strip()]


def test_one_machine_has_one_row(clock):
    job = begin(lambda job: None)
    clock.seconds += 10
    encode(job, 0, 50)
    text = text_of(job.table(200))
    assert "encode: 50 of 200 documents, 1 of 4 parts, 30 s left" in text
    rows = [cells(line) for line in text.splitlines() if "│" in line]
    assert rows == [["this machine", "5", "500", "10"]]
    assert job.describe() == "1 of 4 parts, 5 documents/s, 500 tokens/s, 10 images/s, 30 s left"


def test_several_nodes_have_a_row_each_and_one_of_all(clock):
    job = begin(lambda job: None)
    clock.seconds += 10
    encode(job, 0, 50, "beta")
    encode(job, 1, 20, "alpha")
    encode(job, 2, 10, "beta", is_last=False)
    text = text_of(job.table(None))
    assert "encode: 80 documents, 2 of 4 parts, 10 s left" in text
    rows = [cells(line) for line in text.splitlines() if "│" in line]
    assert rows == [
        ["alpha", "2", "200", "4"],
        ["beta", "6", "600", "12"],
        ["all", "8", "800", "16"],
    ]
    assert job.describe().endswith("alpha 2 documents/s, beta 6 documents/s")


def test_what_an_earlier_process_encoded_does_not_count_for_the_speed(clock):
    job = JobProgress(
        lambda job: None, parts=5, size=400, complete=PartRecord(stop=100, rejected=1), pending=2
    )
    task, earlier = Task("words", 3, SourcePart(size=100)), part_of(12)
    job.note(Encoded(task, earlier, node="a"))
    assert (job.documents, job.describe()) == (
        112,
        "3 of 5 parts, 0 documents/s, 0 tokens/s, 0 images/s, 1 rejected",
    )
    clock.seconds += 4
    whole = earlier + PartRecord(stop=2, rejected=2) + part_of(8)
    job.note(Encoded(task, whole, [whole], "a"))
    assert (job.documents, job.describe()) == (
        122,
        "4 of 5 parts, 2 documents/s, 200 tokens/s, 4 images/s, 12 s left, 3 rejected",
    )
    assert "122 of 150 documents, 4 of 5 parts, 3 rejected, 12 s left" in text_of(job.table(150))


def test_it_is_shown_once_a_second_at_most_and_at_the_end(clock):
    shown = []
    job = begin(lambda job: shown.append((clock.seconds, job.documents)), parts=100)
    for number in range(100):
        clock.seconds += 0.1
        encode(job, number, 1)
    assert shown[-1] == (clock.seconds, 100)
    times = [seconds for seconds, _ in shown[:-1]]
    assert 8 <= len(times) <= 10
    assert all(later - earlier >= 0.99 for earlier, later in pairwise(times))


def test_a_terminal_gets_the_table(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with show_job(50) as display:
        encode(begin(display, parts=1), 0, 50)
    assert "50 of 50 documents" in terminal.getvalue()
    assert "this machine" in terminal.getvalue()


def test_anything_else_gets_lines(clock, capsys):
    with show_job(50) as display:
        encode(begin(display, parts=1), 0, 50)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("encode: 50/50 after 0 s") and "tokens/s" in line


def test_quiet_shows_nothing(clock, capsys):
    with show_job(50, quiet=True) as display:
        encode(begin(display, parts=1), 0, 50)
    assert capsys.readouterr().err == ""
