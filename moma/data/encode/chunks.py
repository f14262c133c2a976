"""Rows cut into chunks: what is encoded, and written, at once.

Where a chunk ends depends on the rows alone, so that what is written does too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moma.data.documents import Document, ImageRef, Rejected

# A chunk ends with the document that reaches one of these.
CHUNK_DOCUMENTS = 1024
CHUNK_IMAGES = 256
CHUNK_CHARACTERS = 1_000_000
# The tokenizer is faster with the texts of several chunks at once, if they are not too long.
CHUNKS_TOGETHER = 8
# More of one document would take gigabytes: tokenizing takes some hundred times the text's size.
MOST_CHARACTERS = 20_000_000
MOST_IMAGES = 10_000


def refusal(document: Document) -> str | None:
    """Why tokenizer and codec cannot hold a document; None if it can."""
    images, characters, plain = _size(document)
    if images > MOST_IMAGES:
        return f"{images} images, at most {MOST_IMAGES}; set the source's max_images"
    if characters > MOST_CHARACTERS:
        return f"{characters} characters of text, at most {MOST_CHARACTERS}; split the document"
    if plain:
        return None
    for text in (document.name, *document.segments):
        if isinstance(text, ImageRef):
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{error.reason} at character {error.start} of {text[:40]!a}"
            return f"not Unicode ({found}); mend it"
    return None


def _size(document: Document) -> tuple[int, int, bool]:
    """Images, characters of text, and whether all of these are ASCII, and the name too."""
    images, characters, plain = 0, 0, document.name.isascii()
    for segment in document.segments:
        if isinstance(segment, str):
            characters += len(segment)
            plain = plain and segment.isascii()
        else:
            images += 1
    return images, characters, plain


@dataclass
class Chunk:
    """Consecutive rows of a source.

    Attributes:
        rows: as the source yields them; those that a tokenizer cannot hold are rejected.
        documents: those of the rows that are documents.
        texts, images: the segments of the documents, in order.
        characters: characters of the texts.
    """

    rows: list[Document | Rejected] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)
    characters: int = 0

    def add(self, row: Document | Rejected) -> None:
        """Take a row in; a document that tokenizer and codec cannot hold as rejected."""
        if isinstance(row, Document):
            if reason := refusal(row):
                row = Rejected(row.row or row.name, reason)
            else:
                self.documents.append(row)
                for segment in row.segments:
                    if isinstance(segment, str):
                        self.texts.append(segment)
                        self.characters += len(segment)
                    else:
                        self.images.append(segment)
        self.rows.append(row)

    def is_full(self, chunk_tokens: int, image_span: int) -> bool:
        """Whether the row that was added last ends it."""
        images = len(self.images)
        return (
            len(self.rows) >= CHUNK_DOCUMENTS
            or images >= CHUNK_IMAGES
            or self.characters >= CHUNK_CHARACTERS
            # A token is a character or more, so that this comes rather too soon than too late.
            or self.characters + images * image_span >= chunk_tokens
        )


def chunks_of(
    rows: Iterable[Document | Rejected], chunk_tokens: int, image_span: int
) -> Iterator[Chunk]:
    """Consecutive rows; documents that tokenizer and codec cannot hold are rejected."""
    chunk = Chunk()
    for row in rows:
        chunk.add(row)
        if chunk.is_full(chunk_tokens, image_span):
            yield chunk
            chunk = Chunk()
    if chunk.rows:
        yield chunk


def together(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks whose texts are encoded at once; where there are images, each by itself."""
    group: list[Chunk] = []
    for chunk in chunks:
        group.append(chunk)
        if (
            len(group) == CHUNKS_TOGETHER
            or chunk.images
            or sum(one.characters for one in group) >= CHUNK_CHARACTERS
        ):
            yield group
            group = []
    if group:
        yield group
