"""Plain text: paragraphs of text files, and rows of JSON Lines."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Literal

from moma.data.documents import Document, Rejected, SourceName
from moma.data.sources.jsonl import Line, read_jsonl, read_lines, require_text
from moma.data.sources.paths import expand_pattern, fingerprint_of
from moma.data.sources.reading import ReaderConfig, check_text, content_hash
from moma.errors import UserError
from moma.recipe import RequiredPath

# A file without blank lines must not become one document that fills the memory.
_MAX_PARAGRAPH_BYTES = 2**20
_JSON_LINES = (".jsonl", ".ndjson")


class TextConfig(ReaderConfig):
    """UTF-8 text files whose paragraphs, separated by blank lines, are the documents.

    In a file whose name ends in `.jsonl` or `.ndjson`, every row is a document. A document is named
    by a hash of its text. A paragraph over 1 MiB is split at the ends of lines into several
    documents, which are held out together.

    Attributes:
        path: the file, or a pattern such as `texts/**/*.txt`.
        text_key: key of the text in a row of JSON Lines.
    """

    kind: Literal["text"] = "text"
    name: SourceName = "text"
    path: RequiredPath
    text_key: str = "text"

    def read_documents(self) -> Iterator[Document | Rejected]:
        """Yield a document for every paragraph or row."""
        for path in expand_pattern(self.path):
            if path.suffix.lower() in _JSON_LINES:
                yield from read_jsonl([path], self._json_document)
            else:
                yield from _paragraphs(path)

    def fingerprint(self) -> str:
        """Return what changes with the size or the time of a file."""
        return fingerprint_of(expand_pattern(self.path))

    def _json_document(self, line: Line) -> Document:
        text = require_text(line.values(), self.text_key)
        return Document(content_hash(text), (text,), row=line.location)


def _paragraphs(path: Path) -> Iterator[Document | Rejected]:
    for is_blank, lines in groupby(read_lines(path), key=lambda line: line.is_blank):
        if not is_blank:
            yield from _hold_out_together(map(_paragraph, _split(lines)))


def _hold_out_together(pieces: Iterator[Document | Rejected]) -> Iterator[Document | Rejected]:
    """Let all pieces of a paragraph be held out as the first one is."""
    first = ""
    for piece in pieces:
        if isinstance(piece, Document):
            piece = replace(piece, held_out_with=first)
            first = first or piece.name
        yield piece


def _paragraph(lines: list[Line]) -> Document | Rejected:
    texts = []
    for line in lines:
        try:
            texts.append(check_text(line.text(), "of the line"))
        except UserError as error:
            reason = f"{error}; its paragraph begins in row {lines[0].number}"
            return Rejected(line.location, reason)
    text = "".join(texts).strip()
    return Document(content_hash(text), (text,), row=lines[0].location)


def _split(lines: Iterator[Line]) -> Iterator[list[Line]]:
    piece: list[Line] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line.data or b"")
        if size >= _MAX_PARAGRAPH_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
