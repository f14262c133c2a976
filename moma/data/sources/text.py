"""Plain text: paragraphs of text files, and rows of JSON Lines."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

from moma.data.documents import Document, Rejected, SourceName
from moma.data.sources.reading import (
    Line,
    ReaderConfig,
    attempt,
    checked_text,
    digest,
    filled,
    fingerprint_of,
    lines,
    matching,
    text_of,
)
from moma.errors import UserError
from moma.recipe import RequiredPath

# A file without blank lines must not become one document that fills the memory.
_LONGEST_PARAGRAPH = 2**20


class TextConfig(ReaderConfig):
    """UTF-8 text files; their paragraphs, separated by blank lines, are the documents.

    Of a file whose name ends in `.jsonl` every row is a document. A document is named by a digest
    of its text. A paragraph over 1 MiB goes on as further documents, cut where a line ends;
    they are held out together.

    Attributes:
        path: the file, or a pattern such as `texts/**/*.txt`.
        text_key: where the text stands in a row of a `.jsonl` file.
    """

    kind: Literal["text"] = "text"
    name: SourceName = "text"
    path: RequiredPath
    text_key: str = "text"

    def _rows(self) -> Iterator[Document | Rejected]:
        for path in matching(self.path):
            by_row = path.suffix.lower() == ".jsonl"
            yield from self._json_rows(path) if by_row else _paragraphs(path)

    def fingerprint(self) -> str:
        """Changes when the size or the time of a file does."""
        return fingerprint_of(matching(self.path))

    def _json_rows(self, path: Path) -> Iterator[Document | Rejected]:
        for line in filled(lines(path)):
            yield attempt(line.place, partial(self._json_document, line))

    def _json_document(self, line: Line) -> Document:
        text = text_of(line.values(), self.text_key)
        return Document(digest(text), (text,), row=line.place)


def _paragraphs(path: Path) -> Iterator[Document | Rejected]:
    for is_filled, rows in groupby(lines(path), key=_is_filled):
        if is_filled:
            yield from _held_out_together(map(_paragraph, _pieces(rows)))


def _held_out_together(pieces: Iterator[Document | Rejected]) -> Iterator[Document | Rejected]:
    """The pieces of a paragraph, which go by the name of the first one."""
    first = ""
    for piece in pieces:
        if isinstance(piece, Document):
            piece = replace(piece, held_out_with=first)
            first = first or piece.name
        yield piece


def _paragraph(rows: list[Line]) -> Document | Rejected:
    texts = []
    for row in rows:
        try:
            texts.append(checked_text(row.text(), "of the line"))
        except UserError as error:
            return Rejected(row.place, f"{error}; its paragraph begins in row {rows[0].number}")
    text = "".join(texts).strip()
    return Document(digest(text), (text,), row=rows[0].place)


def _pieces(rows: Iterator[Line]) -> Iterator[list[Line]]:
    piece: list[Line] = []
    size = 0
    for row in rows:
        piece.append(row)
        size += len(row.data or b"")
        if size >= _LONGEST_PARAGRAPH:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _is_filled(row: Line) -> bool:
    return row.data is None or bool(row.data.decode("utf-8-sig", "replace").strip())
