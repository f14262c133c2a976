"""Documents → token ids: chunks of rows through tokenizer and codec.

    rows → chunks ─┬→ texts, in two threads → tokenizer ───────────┬→ ids of each document
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
from itertools import accumulate, chain, pairwise
from typing import Self, TypeGuard, TypeVar

import numpy as np

from moma.data.documents import Document, Picture, Rejected, Segment
from moma.data.read_ahead import PictureReader, Pixels
from moma.errors import UserError
from moma.vocabulary import IMAGE, Vocabulary

# A chunk ends with the document that reaches one of these.
CHUNK_DOCUMENTS = 1024
CHUNK_PICTURES = 256
CHUNK_CHARACTERS = 1_000_000
# The tokenizer is faster with the texts of several chunks at once, if they are not too long.
CHUNKS_TOGETHER = 8
TEXTS_AHEAD = 2
BATCH_PICTURES = 16
BATCHES_AHEAD = 2
# More of one document would take gigabytes: tokenizing takes some hundred times the text's size.
MOST_CHARACTERS = 20_000_000
MOST_PICTURES = 10_000

T = TypeVar("T")
EncodeText = Callable[[list[str]], list[list[int]]]
EncodePictures = Callable[[list[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class EncodedChunk:
    """Consecutive rows of a source, encoded.

    Attributes:
        documents: those that could be encoded.
        ids: their tokens one behind another, integers of shape [tokens]; pictures are wrapped in
            their boundaries and documents in their beginning and end.
        lengths: tokens of each document.
        pictures: pictures of each document.
        rejected: the other rows.
    """

    documents: list[Document]
    ids: np.ndarray
    lengths: list[int]
    pictures: list[int]
    rejected: list[Rejected]


def refusal(document: Document) -> str | None:
    """Why tokenizer and codec cannot hold a document; None if it can."""
    pictures, characters = _size(document)
    if pictures > MOST_PICTURES:
        return f"{pictures} pictures, at most {MOST_PICTURES}; set the source's max_pictures"
    if characters > MOST_CHARACTERS:
        return f"{characters} characters of text, at most {MOST_CHARACTERS}; split the document"
    for text in (document.name, *filter(_is_text, document.segments)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{error.reason} at character {error.start} of {text[:40]!a}"
            return f"not Unicode ({found}); mend it"
    return None


def _is_text(segment: Segment) -> TypeGuard[str]:
    return isinstance(segment, str)


def _size(document: Document) -> tuple[int, int]:
    """Pictures, and characters of text."""
    pictures = characters = 0
    for segment in document.segments:
        if isinstance(segment, str):
            characters += len(segment)
        else:
            pictures += 1
    return pictures, characters


@dataclass(frozen=True)
class _Chunk:
    """Consecutive rows of a source.

    Attributes:
        rows: as the source yields them; those that a tokenizer cannot hold are rejected.
        pictures: pictures of the documents.
        characters: characters of their texts.
    """

    rows: list[Document | Rejected]
    pictures: int
    characters: int

    @property
    def segments(self) -> Iterator[Segment]:
        """The segments of the documents, in order."""
        for row in self.rows:
            if isinstance(row, Document):
                yield from row.segments


@dataclass(frozen=True)
class _Encoding:
    """A chunk whose texts are being encoded, with those of its neighbours.

    Attributes:
        chunk: the rows.
        texts: ids of every text of all these chunks, in order; each takes its own.
    """

    chunk: _Chunk
    texts: Future[Iterator[np.ndarray]]


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
        self._beginning = np.array([vocabulary.beginning])
        self._end = np.array([vocabulary.end])
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
        # All leave Python for most of their time, so that texts, codes and rows overlap. While one
        # thread turns what the tokenizer gave into ids, the tokenizer works for the other.
        self._text_threads = ThreadPoolExecutor(TEXTS_AHEAD, "texts")
        self._code_thread = ThreadPoolExecutor(1, "codes")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for threads in (self._text_threads, self._code_thread):
            threads.shutdown(cancel_futures=True)

    def encode(
        self, rows: Iterable[Document | Rejected], reader: PictureReader, chunk_tokens: int
    ) -> Iterator[EncodedChunk]:
        """The rows of a source, encoded or rejected, a chunk of about so many tokens at a time."""
        codes = _Codes(self._code_thread, self._codes_of)
        read: list[bytes | UserError] = []
        for item in reader.read(self._stream(rows, chunk_tokens)):
            if isinstance(item, _Encoding):
                yield self._join(item.chunk.rows, item.texts.result(), iter(read), codes.take())
                read = []
            elif isinstance(item, Pixels):
                codes.add(item)
                read.append(item.digest)
            else:
                read.append(item)

    def _stream(
        self, rows: Iterable[Document | Rejected], chunk_tokens: int
    ) -> Iterator[Picture | _Encoding]:
        """The pictures of each chunk, and behind them the chunk itself."""
        chunks = _chunks(rows, chunk_tokens, self._vocabulary.image_span)
        for encodings in _ahead(map(self._begin, _together(chunks)), TEXTS_AHEAD):
            for encoding in encodings:
                segments = encoding.chunk.segments
                yield from (segment for segment in segments if isinstance(segment, Picture))
                yield encoding

    def _begin(self, chunks: list[_Chunk]) -> list[_Encoding]:
        """Let the texts of some chunks be encoded."""
        segments = (segment for chunk in chunks for segment in chunk.segments)
        texts = [segment for segment in segments if isinstance(segment, str)]
        encoded = self._text_threads.submit(self._texts, texts)
        return [_Encoding(chunk, encoded) for chunk in chunks]

    def _texts(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Ids of each text: views of one array, since making an array takes as long as a text."""
        encoded = self._encode_text(texts)
        bounds = list(accumulate(map(len, encoded), initial=0))
        ids = np.fromiter(chain.from_iterable(encoded), np.int64, bounds[-1])
        views = [ids[start:end] for start, end in pairwise(bounds)]
        if self._reserved[ids].any():
            wrong = next(
                text for text, one in zip(texts, views, strict=True) if self._reserved[one].any()
            )
            raise ValueError(f"the tokenizer gave a special id or an image code for {wrong!r}")
        return iter(views)

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
        rows: list[Document | Rejected],
        texts: Iterator[np.ndarray],
        read: Iterator[bytes | UserError],
        codes: dict[bytes, np.ndarray],
    ) -> EncodedChunk:
        documents: list[Document] = []
        rejected: list[Rejected] = []
        pieces: list[np.ndarray] = [self._end[:0]]
        lengths: list[int] = []
        pictures: list[int] = []
        for row in rows:
            if isinstance(row, Rejected):
                rejected.append(row)
                continue
            ids, broken = _join_one(row, texts, read, codes)
            tokens = sum(map(len, ids))
            if not broken and not tokens:
                broken = "it is empty: neither text nor a picture"
            if broken:
                rejected.append(Rejected(row.row or row.name, broken))
                continue
            documents.append(row)
            pieces += (self._beginning, *ids, self._end)
            lengths.append(tokens + 2)
            pictures.append(_size(row)[0])
        return EncodedChunk(documents, np.concatenate(pieces), lengths, pictures, rejected)


def _join_one(
    document: Document,
    texts: Iterator[np.ndarray],
    read: Iterator[bytes | UserError],
    codes: dict[bytes, np.ndarray],
) -> tuple[list[np.ndarray], str]:
    """A document's ids and what is wrong with it; takes its texts and pictures from its chunk's."""
    ids: list[np.ndarray] = []
    broken = ""
    for segment in document.segments:
        if isinstance(segment, str):
            ids.append(next(texts))
            continue
        found = next(read)
        if isinstance(found, UserError):
            broken = broken or str(found)
        else:
            ids.append(codes[found])
    return ids, broken


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
) -> Iterator[_Chunk]:
    """Consecutive rows; documents that tokenizer and codec cannot hold are rejected."""
    chunk: list[Document | Rejected] = []
    pictures = characters = 0
    for row in rows:
        if isinstance(row, Document):
            if reason := refusal(row):
                row = Rejected(row.row or row.name, reason)
            else:
                more_pictures, more_characters = _size(row)
                pictures += more_pictures
                characters += more_characters
        chunk.append(row)
        if (
            len(chunk) >= CHUNK_DOCUMENTS
            or pictures >= CHUNK_PICTURES
            or characters >= CHUNK_CHARACTERS
            # A token is a character or more, so that this comes rather too soon than too late.
            or characters + pictures * image_span >= chunk_tokens
        ):
            yield _Chunk(chunk, pictures, characters)
            chunk, pictures, characters = [], 0, 0
    if chunk:
        yield _Chunk(chunk, pictures, characters)


def _together(chunks: Iterable[_Chunk]) -> Iterator[list[_Chunk]]:
    """Chunks whose texts are encoded at once; where there are pictures, each by itself."""
    group: list[_Chunk] = []
    for chunk in chunks:
        group.append(chunk)
        if (
            len(group) == CHUNKS_TOGETHER
            or chunk.pictures
            or sum(one.characters for one in group) >= CHUNK_CHARACTERS
        ):
            yield group
            group = []
    if group:
        yield group


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, each when so many further ones have been begun."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
