"""Printing of the result of every verb, as tables or as JSON."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from moma.study.tables import Table, flattened, number

# Wider than any table, to measure the width that a table needs.
_UNLIMITED = 100_000
# Narrower columns would be left out on a terminal of a few characters, or of COLUMNS=0.
_MIN_COLUMN = 12


def print_result(
    result: object, as_json: bool, tables: Iterable[Table], lines: Sequence[object] = ()
) -> None:
    """Print one JSON value, or tables and then lines."""
    if as_json:
        print(json.dumps(result))
        return
    for table in tables:
        print_table(table)
    for line in lines:
        print(line)


def print_table(content: Table) -> None:
    """Print a table without markup; nothing is cut off.

    On a terminal cells are folded to its width; in a pipe or a file every row is one line.
    """
    table = RichTable(
        *content.head,
        title=content.title,
        caption=content.explanation or None,
        show_header=bool(content.head),
        box=box.HEAVY_HEAD if content.head else box.ROUNDED,
    )
    cells = [[number(cell) for cell in row] for row in content.rows]
    for _ in cells[0][len(table.columns) :] if cells else ():
        table.add_column()
    for index, column in enumerate(table.columns):
        column.overflow = "fold"
        column.justify = "right" if content.head and index else "left"
    for row in cells:
        table.add_row(*row, style="bold" if row[0] == "all" else None)
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        width = console.measure(table, options=console.options.update(max_width=_UNLIMITED))
        console.width = max(console.width, width.maximum)
    console.width = max(console.width, _MIN_COLUMN * len(table.columns))
    console.print(table)


def key_values(title: object, result: Mapping[str, Any]) -> Table:
    """A table with a row for each key of a result; nested keys are joined by dots."""
    return Table(str(title), "", (), list(flattened(result, ".")))


def records(title: object, rows: Sequence[Mapping[str, object]]) -> Table:
    """A table with a row for each object and a column for each of their keys."""
    return Table(str(title), "", list(rows[0]), [list(row.values()) for row in rows])


def notice(message: object) -> None:
    """Print a message to standard error, beside a result."""
    print(f"moma: {message}", file=sys.stderr)
