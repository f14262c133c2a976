"""Documents → token ids: chunks of rows through tokenizer and codec.

    rows → chunks ─┬→ texts, in two threads → tokenizer ───────────┬→ ids of each document
                   └→ images, read ahead → batches → codec ──────┘

The codec of a GPU has a thread; that of a CPU, which needs all cores, does not.

Chunks, and the batches of images inside them, depend on the rows alone: the number of worker
processes changes nothing of what comes out. A document that cannot be encoded is rejected with the
reason; the others are not disturbed.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from threading import Lock
from typing import NamedTuple, ParamSpec, Self, TypeVar

import numpy as np

from moma.data.documents import Document, ImageRef, Rejected
from moma.data.encode.chunks import Chunk, chunks_of, together
from moma.data.encode.read_ahead import ImageReader, Pixels
from moma.errors import UserError
from moma.vocabulary import IMAGE, Vocabulary

TEXTS_AHEAD = 2
BATCH_IMAGES = 16
BATCHES_AHEAD = 2

P = ParamSpec("P")
T = TypeVar("T")
EncodeText = Callable[[list[str]], Iterable[list[int]]]
EncodeImages = Callable[[list[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class EncodedChunk:
    """Consecutive rows of a source, encoded.

    Attributes:
        documents: those that could be encoded.
        ids: their tokens one behind another, integers of shape [tokens]; images are wrapped in
            their boundaries and documents in their beginning and end.
        lengths: tokens of each document, int64 of shape [documents].
        images: images of each document, int64 of shape [documents].
        rejected: the other rows.
    """

    documents: list[Document]
    ids: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    rejected: list[Rejected]


class _Ids(NamedTuple):
    """Ids of texts.

    Attributes:
        flat: of all texts, one behind another, int64 of shape [tokens].
        lengths: how many each text has, int64 of shape [texts].
    """

    flat: np.ndarray
    lengths: np.ndarray

    def split(self, counts: Iterable[int]) -> "Iterator[_Ids]":
        """Those of the first so many texts, of the next so many, …."""
        text = token = 0
        for count in counts:
            lengths = self.lengths[text : text + count]
            tokens = int(lengths.sum())
            yield _Ids(self.flat[token : token + tokens], lengths)
            text, token = text + count, token + tokens


@dataclass(frozen=True)
class _Encoding:
    """A chunk whose texts are being encoded, with those of its neighbours.

    Attributes:
        chunk: the rows.
        texts: the ids of each of these chunks, in order; each takes its own.
    """

    chunk: Chunk
    texts: Future[Iterator[_Ids]]


class _AtOnce(Executor):
    """Calls in the calling thread, which waits; what a call raises leaves here."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class Encoder:
    """Rows → encoded documents, chunk by chunk; a context manager that ends its threads."""

    def __init__(
        self,
        encode_text: EncodeText,
        encode_images: EncodeImages | None,
        vocabulary: Vocabulary,
        codec_apart: bool,
    ) -> None:
        self._encode_text = encode_text
        self._encode_images = encode_images
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
        # They leave Python for most of their time, so that texts and rows overlap. While one
        # thread turns what the tokenizer gave into ids, the tokenizer works for the other: one
        # after the other, or both would be done with it, and wait for Python, at the same time.
        self._text_threads = ThreadPoolExecutor(TEXTS_AHEAD, "texts")
        self._tokenizing = Lock()
        # Once two threads have run PyTorch on a CPU, each has threads of OpenMP of its own,
        # together more than there are cores: these then sleep between any two operations
        # (docs/results/data.md).
        self._codec_calls = ThreadPoolExecutor(1, "codes") if codec_apart else _AtOnce()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for threads in (self._text_threads, self._codec_calls):
            threads.shutdown(cancel_futures=True)

    def encode(
        self, rows: Iterable[Document | Rejected], reader: ImageReader, chunk_tokens: int
    ) -> Iterator[EncodedChunk]:
        """The rows of a source, encoded or rejected, a chunk of about so many tokens at a time."""
        codes = _Codes(self._codec_calls, self._codes_of)
        read: list[bytes | UserError] = []
        for item in reader.read(self._stream(rows, chunk_tokens)):
            if isinstance(item, _Encoding):
                yield self._join(item.chunk, next(item.texts.result()), read, codes.take())
                read = []
            elif isinstance(item, Pixels):
                codes.add(item)
                read.append(item.digest)
            else:
                read.append(item)

    def _stream(
        self, rows: Iterable[Document | Rejected], chunk_tokens: int
    ) -> Iterator[ImageRef | _Encoding]:
        """The images of each chunk, and behind them the chunk itself."""
        chunks = chunks_of(rows, chunk_tokens, self._vocabulary.image_span)
        for encodings in _ahead(map(self._begin, together(chunks)), TEXTS_AHEAD):
            for encoding in encodings:
                yield from encoding.chunk.images
                yield encoding

    def _begin(self, chunks: list[Chunk]) -> list[_Encoding]:
        """Let the texts of some chunks be encoded."""
        encoded = self._text_threads.submit(self._texts, [chunk.texts for chunk in chunks])
        return [_Encoding(chunk, encoded) for chunk in chunks]

    def _texts(self, groups: list[list[str]]) -> Iterator[_Ids]:
        """Ids of the texts of each group."""
        texts = list(chain.from_iterable(groups))
        with self._tokenizing:
            encoded = self._encode_text(texts)
        lengths: list[int] = []

        def counted() -> Iterator[list[int]]:
            for ids in encoded:
                lengths.append(len(ids))
                yield ids

        flat = np.fromiter(chain.from_iterable(counted()), np.int64)
        ids = _Ids(flat, np.array(lengths, np.int64))
        if self._reserved[flat].any():
            wrong = next(
                text
                for text, (own, _) in zip(texts, ids.split([1] * len(texts)), strict=True)
                if self._reserved[own].any()
            )
            raise ValueError(f"the tokenizer gave a special id or an image code for {wrong!r}")
        return ids.split(map(len, groups))

    def _codes_of(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Ids of images with their boundaries."""
        if self._encode_images is None:
            raise UserError(
                "there is an image, but no codec: data.tokenizers has none, or none was trained, "
                "since the first documents had no images; take others, or raise "
                "codec_training.max_documents, and prepare another folder"
            )
        codes = self._encode_images(values)
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
        chunk: Chunk,
        texts: _Ids,
        read: list[bytes | UserError],
        codes: dict[bytes, np.ndarray],
    ) -> EncodedChunk:
        """Put texts and images of a chunk into its documents, for all of them at once."""
        segments = _Segments.of(chunk.documents)
        unreadable = np.array([isinstance(found, UserError) for found in read], bool)
        lengths = np.empty(len(segments.is_text), np.int64)
        lengths[segments.is_text] = texts.lengths
        lengths[~segments.is_text] = np.where(unreadable, 0, self._vocabulary.image_span)
        flat = np.empty(lengths.sum(), np.int64)
        in_text = np.repeat(segments.is_text, lengths)
        flat[in_text] = texts.flat
        drawn = [codes[found] for found in read if not isinstance(found, UserError)]
        flat[~in_text] = np.concatenate([flat[:0], *drawn])
        tokens = segments.sums(lengths)
        reasons = _reasons(segments, tokens, read)
        kept = np.ones(len(chunk.documents), bool)
        kept[list(reasons)] = False
        if reasons:
            flat = flat[np.repeat(kept, tokens)]
        all_are_kept = len(chunk.documents) == len(chunk.rows) and not reasons
        documents, rejected = (
            (chunk.documents, []) if all_are_kept else _told_apart(chunk.rows, reasons)
        )
        images = segments.sums(~segments.is_text)[kept]
        return EncodedChunk(
            documents, self._wrapped(flat, tokens[kept]), tokens[kept] + 2, images, rejected
        )

    def _wrapped(self, flat: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The ids of documents, each between its beginning and its end.

        Args:
            flat: their ids, one behind another.
            tokens: how many each of them has.
        """
        ends = np.cumsum(tokens + 2)
        wrapped = np.empty(len(flat) + 2 * len(tokens), np.int64)
        inside = np.ones(len(wrapped), bool)
        for places, id_ in (
            (ends - tokens - 2, self._vocabulary.beginning),
            (ends - 1, self._vocabulary.end),
        ):
            wrapped[places] = id_
            inside[places] = False
        wrapped[inside] = flat
        return wrapped


class _Segments(NamedTuple):
    """The segments of some documents, one behind another.

    Attributes:
        is_text: whether each is a text, else it is an image; bool of shape [segments].
        bounds: number of the first segment of each document, and at last of all segments; int64
            of shape [documents + 1].
    """

    is_text: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, documents: list[Document]) -> "_Segments":
        """Those of documents."""
        parts = [document.segments for document in documents]
        kinds = [isinstance(segment, str) for segment in chain.from_iterable(parts)]
        return cls(np.array(kinds, bool), _starts(np.array([*map(len, parts)], np.int64)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over the segments of each document, of a value for each segment."""
        return np.diff(_starts(values)[self.bounds])


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where each of some runs begins, and where the last ends; int64 of shape [runs + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _reasons(
    segments: _Segments, tokens: np.ndarray, read: list[bytes | UserError]
) -> dict[int, str]:
    """What is wrong with a document, by its number: its first broken image, or nothing in it."""
    reasons: dict[int, str] = {}
    of_image = np.searchsorted(segments.bounds, np.flatnonzero(~segments.is_text), "right") - 1
    for number, found in zip(of_image.tolist(), read, strict=True):
        if isinstance(found, UserError):
            reasons.setdefault(number, str(found))
    for number in np.flatnonzero(tokens == 0).tolist():
        reasons.setdefault(number, "it is empty: neither text nor an image")
    return reasons


def _told_apart(
    rows: list[Document | Rejected], reasons: dict[int, str]
) -> tuple[list[Document], list[Rejected]]:
    """Documents, and rows that are rejected: already, or for a reason by the document's number."""
    documents: list[Document] = []
    rejected: list[Rejected] = []
    number = 0
    for row in rows:
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        if reason := reasons.get(number):
            rejected.append(Rejected(row.row or row.name, reason))
        else:
            documents.append(row)
        number += 1
    return documents, rejected


class _Codes:
    """The codes of a chunk's images: equal images are encoded once."""

    def __init__(
        self, calls: Executor, encode: Callable[[list[np.ndarray]], list[np.ndarray]]
    ) -> None:
        self._calls, self._encode = calls, encode
        self._batch: dict[bytes, np.ndarray] = {}
        self._running: deque[tuple[list[bytes], Future[list[np.ndarray]]]] = deque()
        self._known: dict[bytes, np.ndarray] = {}
        self._seen: set[bytes] = set()

    def add(self, pixels: Pixels) -> None:
        """Encode an image; waits if too many are on their way."""
        if pixels.digest in self._seen:
            return
        self._seen.add(pixels.digest)
        self._batch[pixels.digest] = pixels.values
        if len(self._batch) == BATCH_IMAGES:
            self._submit()
        while len(self._running) > BATCHES_AHEAD:
            self._collect()

    def take(self) -> dict[bytes, np.ndarray]:
        """Ids by digest of all images since the last call, boundaries included."""
        if self._batch:
            self._submit()
        while self._running:
            self._collect()
        known, self._known, self._seen = self._known, {}, set()
        return known

    def _submit(self) -> None:
        running = self._calls.submit(self._encode, list(self._batch.values()))
        self._running.append((list(self._batch), running))
        self._batch = {}

    def _collect(self) -> None:
        digests, running = self._running.popleft()
        self._known.update(zip(digests, running.result(), strict=True))


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, each when so many further ones have been begun."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
