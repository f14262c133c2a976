"""Figures for people: the tables that a page, a terminal and the docs show."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A table for people, on a page or on a terminal.

    Attributes:
        title: what it shows.
        explanation: how to read it.
        head: names of the columns; empty for a table of keys and values.
        rows: the first cell of each is a label.
    """

    title: str
    explanation: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]


def number(value: object) -> str:
    """A value as a cell shows it: four significant digits, and a dash for None."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    """A share as a cell shows it."""
    return f"{100 * share:.0f}%"
