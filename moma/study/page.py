"""A self-contained HTML page of text, tables and images; it loads nothing."""

import base64
import html
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from moma.data.outputs import write_output
from moma.images import png_bytes
from moma.study.tables import Table, number

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


class Page:
    """An HTML page that is built section by section."""

    def __init__(self, title: str, introduction: str, style: str = ""):
        self._title, self._style = title, _STYLE + style
        self._parts = [f"<h1>{html.escape(title)}</h1>", paragraph(introduction)]

    def section(self, title: str, *parts: str) -> None:
        """Add a section of HTML made by the functions of this module."""
        body = "\n".join(parts)
        self.add(f"<section><h2>{html.escape(title)}</h2>\n{body}\n</section>")

    def add_table(self, content: Table) -> None:
        """Add a section for a table."""
        parts = [paragraph(content.explanation)] if content.explanation else []
        self.section(content.title, *parts, table(content))

    def add(self, part: str) -> None:
        """Add HTML without a title."""
        self._parts.append(part)

    def write(self, path: Path) -> None:
        """Write the page; raises `UserError` if a file is there that moma did not write."""
        body = "\n".join(self._parts)
        page = (
            f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
            f"<meta name='viewport' content='width=device-width'>"
            f"<title>{html.escape(self._title)}</title><style>\n{self._style}</style></head>"
            f"<body><main>\n{body}\n</main></body></html>\n"
        )
        write_output(path, page.encode())


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def table(content: Table) -> str:
    """A table without its title; numbers are rounded to four digits."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in content.head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(number(cell))}</td>" for cell in row) + "</tr>"
        for row in content.rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def figure(plot: Figure) -> str:
    """A matplotlib figure of one plot as an embedded PNG."""
    axes = plot.axes[0]
    text = f"{axes.get_title()}: {axes.get_ylabel()} over {axes.get_xlabel()}"
    png = png_bytes(plot, dpi=110)
    return f"<img alt='{html.escape(text)}' src='{data_url(png)}'>"


def panels(plots: Iterable[Figure]) -> str:
    """Figures side by side, or one below the other on a narrow screen."""
    return f"<div class='panels'>{''.join(map(figure, plots))}</div>"


def tile(image: Image.Image, title: str, mark: str = "") -> str:
    """A small image, framed by `mark`: `ok`, `half`, `no`, or nothing."""
    text = html.escape(title)
    source = data_url(png_bytes(image, optimize=True))
    return f"<img class='tile {mark}' alt='{text}' title='{text}' src='{source}'>"


def captioned(tiles: Iterable[str], caption: str) -> str:
    """Tiles side by side above a caption."""
    return (
        f"<figure><div class='row'>{''.join(tiles)}</div>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def grid(figures: Iterable[str]) -> str:
    """Figures in as many columns as fit."""
    return f"<div class='grid'>{''.join(figures)}</div>"


def data_url(png: bytes) -> str:
    """A PNG file as a URL that contains it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
