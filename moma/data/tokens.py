"""Documents → token ids: chunks of rows through tokenizer and codec.

    rows → chunks ─┬→ texts, in a thread → tokenizer ──────────────┬→ ids of each document
                   └→ pictures, read ahead → batches → codec, in a ┘
                                                       thread
Chunks, and the batches of pictures inside them, depend on the rows alone: the number of worker
processes changes nothing of what comes out. A document that cannot be encoded is rejected with the
reason; the others are not disturbed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np

from moma.data.documents import Document, Picture, Rejected
from moma.data.read_ahead import PictureReader, Pixels
from moma.errors import UserError
from moma.vocabulary import IMAGE, Vocabulary

# A chunk ends with the document that reaches one of these.
CHUNK_DOCUMENTS = 1024
CHUNK_PICTURES = 256
CHUNK_CHARACTERS = 1_000_000
BATCH_PICTURES = 16
BATCHES_AHEAD = 2
# More of one document would take gigabytes: tokenizing takes some hundred times the text's size.
MOST_CHARACTERS = 20_000_000
MOST_PICTURES = 10_000

EncodeText = Callable[[list[str]], list[list[int]]]
EncodePictures = Callable[[list[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class EncodedDocument:
    """A document and its tokens.

    Attributes:
        document: as its source yields it.
        ids: of each segment, pictures wrapped in their boundaries; beginning and end are missing.
    """

    document: Document
    ids: list[np.ndarray]

    @property
    def pictures(self) -> int:
        """How many of its segments are pictures."""
        return sum(isinstance(segment, Picture) for segment in self.document.segments)


def refusal(document: Document) -> str | None:
    """Why tokenizer and codec cannot hold a document; None if it can."""
    texts = [segment for segment in document.segments if isinstance(segment, str)]
    pictures = len(document.segments) - len(texts)
    if pictures > MOST_PICTURES:
        return f"{pictures} pictures, at most {MOST_PICTURES}; set the source's max_pictures"
    characters = sum(map(len, texts))
    if characters > MOST_CHARACTERS:
        return f"{characters} characters of text, at most {MOST_CHARACTERS}; split the document"
    try:
        for text in (document.name, *texts):
            text.encode()
    except UnicodeEncodeError as error:
        found = f"{error.reason} at character {error.start} of {text[:40]!a}"
        return f"not Unicode ({found}); mend it"
    return None


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows of a source whose texts are being encoded.

    Attributes:
        rows: as the source yields them; those that a tokenizer cannot hold are rejected.
        texts: ids of every text of the documents, in order.
    """

    rows: list[Document | Rejected]
    texts: Future[list[np.ndarray]]


class Encoder:
    """Rows → encoded documents, chunk by chunk; a context manager that ends its threads."""

    def __init__(
        self,
        encode_text: EncodeText,
        encode_pictures: EncodePictures | None,
        vocabulary: Vocabulary,
    ) -> None:
        self._encode_text = encode_text
        self._encode_pictures = encode_pictures
        self._vocabulary = vocabulary
        self._id_of_code = np.asarray(vocabulary.image_codes, dtype=np.int64)
        self._reserved = vocabulary.modality_of_id == IMAGE
        self._reserved[
            [
                vocabulary.beginning,
                vocabulary.end,
                vocabulary.padding,
                vocabulary.begin_image,
                vocabulary.end_image,
            ]
        ] = True
        # Both leave Python for most of their time, so that texts, codes and rows overlap.
        self._text_thread = ThreadPoolExecutor(1, "texts")
        self._code_thread = ThreadPoolExecutor(1, "codes")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for thread in (self._text_thread, self._code_thread):
            thread.shutdown(cancel_futures=True)

    def encode(
        self, rows: Iterable[Document | Rejected], reader: PictureReader, chunk_tokens: int
    ) -> Iterator[list[EncodedDocument | Rejected]]:
        """The rows of a source, encoded or rejected, a chunk of about so many tokens at a time."""
        codes = _Codes(self._code_thread, self._codes_of)
        read: list[bytes | UserError] = []
        for item in reader.read(self._stream(rows, chunk_tokens)):
            if isinstance(item, _Chunk):
                yield self._join(item, iter(read), codes.take())
                read = []
            elif isinstance(item, Pixels):
                codes.add(item)
                read.append(item.digest)
            else:
                read.append(item)

    def _stream(
        self, rows: Iterable[Document | Rejected], chunk_tokens: int
    ) -> Iterator[Picture | _Chunk]:
        """The pictures of each chunk, and behind them the chunk itself."""
        for chunk in _chunks(rows, chunk_tokens, self._vocabulary.image_span):
            documents = [row for row in chunk if isinstance(row, Document)]
            segments = [segment for document in documents for segment in document.segments]
            texts = [segment for segment in segments if isinstance(segment, str)]
            encoded = self._text_thread.submit(self._texts, texts)
            yield from (segment for segment in segments if isinstance(segment, Picture))
            yield _Chunk(chunk, encoded)

    def _texts(self, texts: list[str]) -> list[np.ndarray]:
        encoded = [np.asarray(ids, dtype=np.int64) for ids in self._encode_text(texts)]
        for text, ids in zip(texts, encoded, strict=True):
            if self._reserved[ids].any():
                raise ValueError(f"the tokenizer gave a special id or an image code for {text!r}")
        return encoded

    def _codes_of(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Ids of pictures with their boundaries."""
        if self._encode_pictures is None:
            raise UserError(
                "there is a picture, but no codec: data.tokenizers has none, or none was trained, "
                "since the first documents had no pictures; take others, or raise "
                "codec_training.documents, and prepare another folder"
            )
        codes = self._encode_pictures(values)
        expected = (len(values), self._vocabulary.codes_per_image)
        if codes.shape != expected:
            raise ValueError(f"the codec gave codes of shape {codes.shape}, not {expected}")
        wrapped = np.empty((len(values), self._vocabulary.image_span), dtype=np.int64)
        wrapped[:, 0] = self._vocabulary.begin_image
        wrapped[:, 1:-1] = self._id_of_code[codes]
        wrapped[:, -1] = self._vocabulary.end_image
        return list(wrapped)

    def _join(
        self,
        chunk: _Chunk,
        read: Iterator[bytes | UserError],
        codes: dict[bytes, np.ndarray],
    ) -> list[EncodedDocument | Rejected]:
        texts = iter(chunk.texts.result())
        return [
            row if isinstance(row, Rejected) else _join_one(row, texts, read, codes)
            for row in chunk.rows
        ]


def _join_one(
    document: Document,
    texts: Iterator[np.ndarray],
    read: Iterator[bytes | UserError],
    codes: dict[bytes, np.ndarray],
) -> EncodedDocument | Rejected:
    """A document's ids; takes what belongs to it from the texts and pictures of its chunk."""
    ids: list[np.ndarray] = []
    broken = None
    for segment in document.segments:
        if isinstance(segment, str):
            ids.append(next(texts))
            continue
        found = next(read)
        if isinstance(found, UserError):
            broken = broken or str(found)
        else:
            ids.append(codes[found])
    if not broken and not any(map(len, ids)):
        broken = "it is empty: neither text nor a picture"
    if broken:
        return Rejected(document.row or document.name, broken)
    return EncodedDocument(document, ids)


class _Codes:
    """The codes of a chunk's pictures: equal pictures are encoded once, in a thread."""

    def __init__(
        self, thread: ThreadPoolExecutor, encode: Callable[[list[np.ndarray]], list[np.ndarray]]
    ) -> None:
        self._thread, self._encode = thread, encode
        self._batch: dict[bytes, np.ndarray] = {}
        self._running: deque[tuple[list[bytes], Future[list[np.ndarray]]]] = deque()
        self._known: dict[bytes, np.ndarray] = {}
        self._seen: set[bytes] = set()

    def add(self, pixels: Pixels) -> None:
        """Encode a picture; waits if too many are on their way."""
        if pixels.digest in self._seen:
            return
        self._seen.add(pixels.digest)
        self._batch[pixels.digest] = pixels.values
        if len(self._batch) == BATCH_PICTURES:
            self._submit()
        while len(self._running) > BATCHES_AHEAD:
            self._collect()

    def take(self) -> dict[bytes, np.ndarray]:
        """Ids by digest of all pictures since the last call, boundaries included."""
        if self._batch:
            self._submit()
        while self._running:
            self._collect()
        known, self._known, self._seen = self._known, {}, set()
        return known

    def _submit(self) -> None:
        running = self._thread.submit(self._encode, list(self._batch.values()))
        self._running.append((list(self._batch), running))
        self._batch = {}

    def _collect(self) -> None:
        digests, running = self._running.popleft()
        self._known.update(zip(digests, running.result(), strict=True))


def _chunks(
    rows: Iterable[Document | Rejected], chunk_tokens: int, image_span: int
) -> Iterator[list[Document | Rejected]]:
    """Consecutive rows; documents that tokenizer and codec cannot hold are rejected."""
    chunk: list[Document | Rejected] = []
    pictures = characters = 0
    for row in rows:
        if isinstance(row, Document) and (reason := refusal(row)):
            row = Rejected(row.row or row.name, reason)
        chunk.append(row)
        if isinstance(row, Document):
            pictures += sum(isinstance(segment, Picture) for segment in row.segments)
            characters += sum(len(part) for part in row.segments if isinstance(part, str))
        if (
            len(chunk) >= CHUNK_DOCUMENTS
            or pictures >= CHUNK_PICTURES
            or characters >= CHUNK_CHARACTERS
            # A token is a character or more, so that this comes rather too soon than too late.
            or characters + pictures * image_span >= chunk_tokens
        ):
            yield chunk
            chunk, pictures, characters = [], 0, 0
    if chunk:
        yield chunk
