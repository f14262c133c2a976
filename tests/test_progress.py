"""Progress: hidden if quiet, few lines without a terminal."""

import io
import sys

import pytest

from moma import progress
from moma.progress import show_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, set by tests."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines_of(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_quiet_progress_prints_nothing(capsys, clock):
    with show_progress("work", 3, quiet=True) as report:
        clock[0] += 1000
        report(3, "note")
    assert lines_of(capsys) == []


def test_without_a_terminal_lines_are_printed_at_intervals(capsys, clock):
    with show_progress("work", 100) as report:
        for done in range(1, 100):
            clock[0] += 1
            report(done, f"note {done}")
    lefts = [f"{100 - at} s left" for at in range(15, 100, 15)]
    expected = [
        f"work: {at}/100 after {at} s, {left}  note {at}"
        for at, left in zip(range(15, 100, 15), lefts, strict=True)
    ]
    assert lines_of(capsys) == expected


def test_the_end_is_always_reported(capsys, clock):
    with show_progress("work", 2) as report:
        report(1)
        report(2, "all done")
        clock[0] += 100
        report(2, "all done")
    assert lines_of(capsys) == ["work: 2/2 after 0 s  all done"]


def test_units_of_an_earlier_process_do_not_count_for_the_speed(capsys, clock):
    with show_progress("work", 200) as report:
        report(100)
        clock[0] += 20
        report(110)
        clock[0] += 20
        report(120)
    assert lines_of(capsys) == [
        "work: 110/200 after 20 s  ",
        "work: 120/200 after 40 s, 160 s left  ",
    ]


def test_a_slow_first_unit_does_not_count_for_the_estimate(capsys, clock):
    with show_progress("work", 100) as report:
        report(0)
        report(0)
        for done, seconds in ((10, 300), (20, 20), (30, 20)):
            clock[0] += seconds
            report(done)
    assert [line.partition(" s")[2] for line in lines_of(capsys)] == [
        "  ",
        ", 160 s left  ",
        ", 140 s left  ",
    ]


def test_an_unknown_total_is_left_out(capsys, clock):
    with show_progress("work", None) as report:
        clock[0] += 20
        report(7, "documents")
    assert lines_of(capsys) == ["work: 7 after 20 s  documents"]


def test_an_error_inside_passes_through(capsys):
    with pytest.raises(ZeroDivisionError), show_progress("work", 2) as report:
        report(1 // 0)


@pytest.mark.parametrize("total", [2, None])
def test_a_terminal_shows_a_bar(monkeypatch, total):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress("a piece of work", total) as report:
        report(2, "note here")
    shown = screen.getvalue()
    assert "a piece of work" in shown and "note here" in shown
    assert f"2/{total or '?'}" in shown
