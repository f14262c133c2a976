"""Plain text: paragraphs of text files, and rows of JSON Lines."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

from moma.data.documents import Document, SourceName, SourcePart
from moma.data.sources.jsonl import Line, read_jsonl, read_lines, require_text
from moma.data.sources.parts import Cut, cut_files, line_cuts, ranges_of
from moma.data.sources.paths import FileRange, expand_pattern, fingerprint_of
from moma.data.sources.reading import ReaderConfig, Row, content_hash
from moma.errors import UserError
from moma.recipe import RequiredPath

# A file without blank lines must not become one document that fills the memory.
MAX_PARAGRAPH_BYTES = 2**20
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

    def parts(self, part_bytes: int) -> list[SourcePart]:
        """Cut the files between rows, or between paragraphs."""

        def cuts_of(path: Path) -> Iterator[Cut]:
            return line_cuts(path, part_bytes, between_paragraphs=not _is_json(path))

        return cut_files(expand_pattern(self.path), part_bytes, cuts_of)

    def read_rows(self, part: SourcePart) -> Iterator[Row]:
        """Yield every paragraph, or every row of JSON Lines."""
        for lines in ranges_of(expand_pattern(self.path), part):
            if _is_json(lines.path):
                for line in read_jsonl([lines]):
                    yield line.location, partial(self._json_document, line)
            else:
                yield from _paragraphs(lines)

    def fingerprint(self) -> str:
        """Return what changes with the size or the time of a file."""
        return fingerprint_of(expand_pattern(self.path))

    def _json_document(self, line: Line) -> Document:
        text = require_text(line.values(), self.text_key)
        return Document(content_hash(text), (text,))


def _is_json(path: Path) -> bool:
    return path.suffix.lower() in _JSON_LINES


def _paragraphs(file: FileRange) -> Iterator[Row]:
    for is_blank, lines in groupby(read_lines(file), key=lambda line: line.is_blank):
        if not is_blank:
            pieces = _split(lines)
            first = next(pieces)
            yield first[0].location, partial(_paragraph, first)
            for piece in pieces:
                yield piece[0].location, partial(_paragraph, piece, first)


def _paragraph(lines: list[Line], first_piece: Sequence[Line] = ()) -> Document:
    """The document of a paragraph's piece, which is held out as the first piece is."""
    texts = []
    for line in lines:
        try:
            texts.append(line.text())
        except UserError as error:
            raise UserError(f"row {line.number}: {error}") from error
    text = "".join(texts).strip()
    first = b"".join(line.data or b"" for line in first_piece).decode("utf-8-sig", "replace")
    together = content_hash(first.strip()) if first_piece else ""
    return Document(content_hash(text), (text,), held_out_with=together)


def _split(lines: Iterator[Line]) -> Iterator[list[Line]]:
    piece: list[Line] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line.data or b"")
        if size >= MAX_PARAGRAPH_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
