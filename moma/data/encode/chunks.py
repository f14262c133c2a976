"""Documents grouped into chunks, the unit that is encoded and written.

Where a chunk ends depends on the documents only, hence what is written does, too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moma.data.documents import Document, ImageRef, Rejected
from moma.errors import quote

# A chunk ends with the document that reaches one of these limits.
CHUNK_DOCUMENTS = 1024
CHUNK_IMAGES = 256
CHUNK_CHARACTERS = 1_000_000
# The tokenizer is faster with the texts of several chunks at once, unless they are long.
CHUNKS_PER_BATCH = 8
# Tokenizing takes about a hundred times the text's size in memory.
MAX_CHARACTERS = 20_000_000
MAX_IMAGES = 10_000
MAX_NAME = 10_000


def reject_unencodable(row: Document | Rejected) -> Document | Rejected:
    """Return the row, rejected if it is a document that tokenizer and codec cannot encode."""
    if isinstance(row, Document) and (reason := find_problem(row)):
        return Rejected(row.row or row.name, reason)
    return row


def find_problem(document: Document) -> str | None:
    """Return why tokenizer and codec cannot encode a document; None if they can."""
    texts = [segment for segment in document.segments if isinstance(segment, str)]
    images, characters = len(document.segments) - len(texts), sum(map(len, texts))
    if images > MAX_IMAGES:
        return f"{images} images, at most {MAX_IMAGES}; set the source's max_images"
    if characters > MAX_CHARACTERS:
        return f"{characters} characters of text, at most {MAX_CHARACTERS}; split the document"
    if len(document.name) > MAX_NAME:
        return f"its name has {len(document.name)} characters, at most {MAX_NAME}; shorten it"
    for text in (document.name, *texts):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{error.reason} at character {error.start} of {quote(text)}"
            return f"not Unicode ({found}); fix the text"
    return None


@dataclass
class Chunk:
    """Consecutive rows of a source.

    Attributes:
        rows: documents and rejected ones, in order.
        documents: the rows that are documents.
        texts, images: the segments of the documents, in order.
        characters: number of characters of the texts.
    """

    rows: list[Document | Rejected] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)
    characters: int = 0

    def add(self, row: Document | Rejected) -> None:
        """Append a row; a document that cannot be encoded is rejected."""
        row = reject_unencodable(row)
        self.rows.append(row)
        if isinstance(row, Rejected):
            return
        self.documents.append(row)
        for segment in row.segments:
            if isinstance(segment, str):
                self.texts.append(segment)
                self.characters += len(segment)
            else:
                self.images.append(segment)

    def is_full(self, chunk_tokens: int, image_span: int) -> bool:
        """Return whether the chunk ends with the row that was added last.

        Args:
            chunk_tokens: maximum tokens of a chunk, approximately.
            image_span: tokens of an image with its boundaries.
        """
        images = len(self.images)
        return (
            len(self.rows) >= CHUNK_DOCUMENTS
            or images >= CHUNK_IMAGES
            or self.characters >= CHUNK_CHARACTERS
            # A token is one character or more, so the chunk ends too early rather than too late.
            or self.characters + images * image_span >= chunk_tokens
        )


def chunk_documents(
    rows: Iterable[Document | Rejected], chunk_tokens: int, image_span: int
) -> Iterator[Chunk]:
    """Group the documents of a source into chunks; see `Chunk.is_full` for the arguments."""
    chunk = Chunk()
    for row in rows:
        chunk.add(row)
        if chunk.is_full(chunk_tokens, image_span):
            yield chunk
            chunk = Chunk()
    if chunk.rows:
        yield chunk


def batch_chunks(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Group chunks whose texts are tokenized in one call; one with images ends its batch."""
    batch: list[Chunk] = []
    for chunk in chunks:
        batch.append(chunk)
        characters = sum(member.characters for member in batch)
        if len(batch) == CHUNKS_PER_BATCH or chunk.images or characters >= CHUNK_CHARACTERS:
            yield batch
            batch = []
    if batch:
        yield batch
