"""What tests of readers share."""

from collections.abc import Iterable, Iterator

from moma.data.documents import Document, Rejected, Segment
from moma.data.sources.dataset import DatasetConfig
from tests.factories import image_bytes


def accepted(rows: Iterable[Document | Rejected]) -> Iterator[Document]:
    """The rows of a source, none of which may be rejected."""
    for row in rows:
        assert isinstance(row, Document), row
        yield row


def segments(rows: Iterable[Document | Rejected]) -> list[Segment | Rejected]:
    """The first segment of each document; a rejected row as it is."""
    return [row.segments[0] if isinstance(row, Document) else row for row in rows]


def source_of(**options):
    return DatasetConfig(**options)


def png(width):
    return image_bytes((width, 2))


def shape(document):
    """The texts of a document, and the widths of its images."""
    return [part if isinstance(part, str) else part.read().width for part in document.segments]
