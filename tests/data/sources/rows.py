"""What tests of readers share."""

from collections.abc import Iterable, Iterator

from moma.data.documents import Document, Rejected


def accepted(rows: Iterable[Document | Rejected]) -> Iterator[Document]:
    """The rows of a source, none of which may be rejected."""
    for row in rows:
        assert isinstance(row, Document), row
        yield row
