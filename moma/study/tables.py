"""Tables for a page or a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table for a page or a terminal.

    Attributes:
        explanation: how to read it.
        head: names of the columns; empty for a table of keys and values.
        rows: cells of each row, the first of which is a label.
    """

    title: str
    explanation: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]


def flattened(
    values: Mapping[str, Any], separator: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects with their keys, joined by a separator."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, separator, f"{prefix}{key}{separator}")
        else:
            yield prefix + key, value


def number(value: object) -> str:
    """Format a cell: four significant digits, and a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def percent(share: float) -> str:
    """Format a share as a percentage."""
    return f"{100 * share:.0f}%"


def runs_table(runs: Iterable[tuple[str, object, float | None]]) -> Table:
    """The runs of which other tables and figures are made.

    Args:
        runs: of each its name there, its folder, and the seconds of its training.
    """
    return Table(
        "Runs",
        "Each folder contains the recipe, log and checkpoints of a run. Seconds are of training, "
        "without pauses, as in the log; those of runs that share a machine depend on each other.",
        ("run", "folder", "seconds"),
        [
            (name, folder, None if seconds is None else f"{seconds:,.1f}")
            for name, folder, seconds in runs
        ],
    )


def markdown(table: Table) -> str:
    """A table with a head as Markdown, without its title and explanation."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(number(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(table.head), "|" + "---|" * len(table.head), *map(line, table.rows)])
