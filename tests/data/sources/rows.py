"""What tests of readers share."""

from collections.abc import Iterable, Iterator

from moma.data.documents import Document, Rejected, Segment


def accepted(rows: Iterable[Document | Rejected]) -> Iterator[Document]:
    """The rows of a source, none of which may be rejected."""
    for row in rows:
        assert isinstance(row, Document), row
        yield row


def segments(rows: Iterable[Document | Rejected]) -> list[Segment | Rejected]:
    """The first segment of each document; a rejected row as it is."""
    return [row.segments[0] if isinstance(row, Document) else row for row in rows]
