"""Documents through tokenizer and codec.

    documents → chunks ─┬→ texts, in two threads → tokenizer ─────┬→ ids of each document
                        └→ images, read ahead → batches → codec ┘

Chunks, and the batches of images in them, depend on the documents only, so the output does not
depend on the number of worker processes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from threading import Event, Lock
from typing import NamedTuple, Self, TypeVar

import numpy as np

from moma.data.documents import Document, DroppedImageError, ImageRef, Rejected, drops_document
from moma.data.encode.chunks import Chunk, batch_chunks, chunk_documents
from moma.data.encode.read_ahead import ImageReader, Pixels
from moma.errors import UserError, quote
from moma.vocabulary import IMAGE, Vocabulary

TEXTS_AHEAD = 2
BATCH_IMAGES = 16
BATCHES_AHEAD = 2
# Characters that are tokenized in one call; Ctrl-C waits for its end.
CALL_CHARACTERS = 2**20

T = TypeVar("T")
EncodeText = Callable[[list[str]], Iterable[list[int]]]
EncodeImages = Callable[[list[np.ndarray]], np.ndarray]
SplitText = Callable[[str], list[str]]


@dataclass(frozen=True)
class EncodedChunk:
    """Consecutive documents of a source, encoded.

    Attributes:
        documents: those that could be encoded.
        ids: their concatenated ids, integers of shape [tokens]; images are wrapped in their
            boundary ids and documents in beginning and end.
        lengths: number of tokens of each document, int64 of shape [documents].
        images: number of images of each document, int64 of shape [documents].
        rejected: those that could not be encoded, or were dropped.
        dropped_images: images that were dropped of the documents.
    """

    documents: list[Document]
    ids: np.ndarray
    lengths: np.ndarray
    images: np.ndarray
    rejected: list[Rejected]
    dropped_images: list[Rejected]


class _Texts(NamedTuple):
    """Encoded texts: concatenated ids [tokens], and the number of ids of each text [texts]."""

    ids: np.ndarray
    lengths: np.ndarray


class _Encoding(NamedTuple):
    """A chunk whose texts are being tokenized in one batch with those of its neighbors.

    Attributes:
        chunk: the chunk.
        texts: those of each chunk of the batch; the chunks take theirs in order.
    """

    chunk: Chunk
    texts: Future[Iterator[_Texts]]


class Encoder:
    """Encodes documents chunk by chunk; a context manager that ends its threads."""

    def __init__(
        self,
        encode_text: EncodeText,
        encode_images: EncodeImages | None,
        vocabulary: Vocabulary,
        codec_in_thread: bool,
        split_text: SplitText = lambda text: [text],
    ) -> None:
        """Start no thread yet.

        Args:
            encode_text: texts → their token ids, none of them special or of an image; called in
                threads.
            encode_images: preprocessed images → codes, integers of shape [images,
                codes_per_image]; None without a codec.
            codec_in_thread: whether `encode_images` is called in a thread of its own.
            split_text: cuts a long text into pieces whose ids are those of the text.
        """
        self._encode_text, self._encode_images = encode_text, encode_images
        self._split_text, self._stopped = split_text, Event()
        self._vocabulary = v = vocabulary
        self._id_of_code = np.asarray(v.image_codes, dtype=np.int64)
        self._reserved = v.modality_of_id == IMAGE
        self._reserved[list(v.special)] = True
        # The tokenizer releases the GIL, so that it overlaps with reading. While one thread
        # converts its output, the tokenizer works for the other: with a lock, since otherwise both
        # would be done with it, and wait for the GIL, at the same time.
        self._text_threads = ThreadPoolExecutor(TEXTS_AHEAD, "texts")
        self._tokenizing = Lock()
        # On a CPU the codec runs in the calling thread. Two threads that run PyTorch have OpenMP
        # threads of their own, together more than there are cores: these then sleep between any
        # two operations (docs/results/data.md).
        self._codec_thread = ThreadPoolExecutor(1, "codec") if codec_in_thread else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        for threads in filter(None, (self._text_threads, self._codec_thread)):
            threads.shutdown(cancel_futures=True)

    def encode(
        self, rows: Iterable[Document | Rejected], reader: ImageReader, chunk_tokens: int
    ) -> Iterator[EncodedChunk]:
        """Encode the documents of a source, in chunks of at most about `chunk_tokens` tokens.

        Args:
            rows: documents, and rejected ones, which stay in their places.
            reader: reads the images.
        """
        codes = _CodecQueue(self._encode_batch, self._codec_thread)
        read: list[bytes | UserError] = []
        for item in reader.read(self._stream(rows, chunk_tokens)):
            if isinstance(item, _Encoding):
                yield self._join(item.chunk, next(item.texts.result()), read, codes.take())
                read = []
            elif isinstance(item, Pixels):
                codes.add(item)
                read.append(item.fingerprint)
            else:
                read.append(item)

    def _stream(
        self, rows: Iterable[Document | Rejected], chunk_tokens: int
    ) -> Iterator[ImageRef | _Encoding]:
        """Yield the images of each chunk, and after them the chunk itself."""
        chunks = chunk_documents(rows, chunk_tokens, self._vocabulary.image_span)
        for encodings in _delay(map(self._begin, batch_chunks(chunks)), TEXTS_AHEAD):
            for encoding in encodings:
                yield from encoding.chunk.images
                yield encoding

    def _begin(self, chunks: list[Chunk]) -> list[_Encoding]:
        """Start to tokenize the texts of some chunks."""
        encoded = self._text_threads.submit(self._tokenize, [chunk.texts for chunk in chunks])
        return [_Encoding(chunk, encoded) for chunk in chunks]

    def _tokenize(self, groups: list[list[str]]) -> Iterator[_Texts]:
        """Encode the texts of each group."""
        texts = list(chain.from_iterable(groups))
        pieces = [self._split_text(text) for text in texts]
        lengths_of_pieces: list[int] = []
        found = [np.empty(0, np.int64)]
        for call in _calls(chain.from_iterable(pieces)):
            if self._stopped.is_set():
                raise InterruptedError
            with self._tokenizing:
                encoded = self._encode_text(call)

            def counted(encoded: Iterable[list[int]] = encoded) -> Iterator[list[int]]:
                for ids in encoded:
                    lengths_of_pieces.append(len(ids))
                    yield ids

            found.append(np.fromiter(chain.from_iterable(counted()), np.int64))
        flat, length_of_piece = np.concatenate(found), iter(lengths_of_pieces)
        lengths = [sum(islice(length_of_piece, len(own))) for own in pieces]
        ends = np.cumsum(lengths, dtype=np.int64)
        if (reserved := self._reserved[flat]).any():
            wrong = texts[np.searchsorted(ends, reserved.argmax(), "right")]
            raise ValueError(
                f"the tokenizer returned a special id or an image code for {quote(wrong)}"
            )
        group_ends = np.cumsum([len(group) for group in groups])[:-1]
        ids_by_group = np.split(flat, _offsets(lengths)[group_ends])
        return map(_Texts, ids_by_group, np.split(np.array(lengths, np.int64), group_ends))

    def _encode_batch(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Return the ids of each image with its boundaries."""
        if self._encode_images is None:
            raise UserError(
                "there is an image, but no codec: data.tokenizers has none, or none was trained, "
                "because the documents drawn for it have no images; name tokenizers with one, or "
                "raise codec_training.max_documents and choose another data.path"
            )
        codes = self._encode_images(values)
        expected = (len(values), self._vocabulary.codes_per_image)
        if codes.shape != expected:
            raise ValueError(f"the codec returned codes of shape {codes.shape}, not {expected}")
        wrapped = np.empty((len(values), self._vocabulary.image_span), dtype=np.int64)
        wrapped[:, 0] = self._vocabulary.begin_image
        wrapped[:, 1:-1] = self._id_of_code[codes]
        wrapped[:, -1] = self._vocabulary.end_image
        return list(wrapped)

    def _join(
        self,
        chunk: Chunk,
        texts: _Texts,
        read: list[bytes | UserError],
        codes: dict[bytes, np.ndarray],
    ) -> EncodedChunk:
        """Assemble the ids of a chunk's documents from texts and images, vectorized.

        Args:
            read: fingerprint of each image, or why it cannot be read.
            codes: ids of each image by its fingerprint.
        """
        segments = [document.segments for document in chunk.documents]
        is_text = np.array([isinstance(part, str) for part in chain.from_iterable(segments)], bool)
        first_segments = _offsets([*map(len, segments)])
        readable = np.array([isinstance(found, bytes) for found in read], bool)
        lengths = np.empty(len(is_text), np.int64)
        lengths[is_text] = texts.lengths
        lengths[~is_text] = readable * self._vocabulary.image_span
        flat = np.empty(lengths.sum(), np.int64)
        in_text = np.repeat(is_text, lengths)
        flat[in_text] = texts.ids
        images = [codes[found] for found in read if isinstance(found, bytes)]
        flat[~in_text] = np.concatenate([flat[:0], *images])
        tokens = np.diff(_offsets(lengths)[first_segments])
        document_of_image = np.searchsorted(first_segments, np.flatnonzero(~is_text), "right") - 1
        reasons, dropped = _unusable(chunk.documents, zip(document_of_image, read, strict=True))
        for index in np.flatnonzero(tokens == 0).tolist():
            reasons.setdefault(index, ("it is empty: neither text nor an image", ""))
        kept = np.ones(len(segments), bool)
        kept[list(reasons)] = False
        if reasons:
            flat = flat[np.repeat(kept, tokens)]
        documents, rejected = _separate(chunk, reasons)
        image_counts = np.bincount(document_of_image[readable], minlength=len(segments))
        return EncodedChunk(
            documents,
            self._wrap(flat, tokens[kept]),
            tokens[kept] + 2,
            image_counts[kept],
            rejected,
            [
                image.rejected
                for index, images in dropped.items()
                if kept[index]
                for image in images
            ],
        )

    def _wrap(self, flat: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Add beginning and end to each document of a number of tokens in concatenated ids."""
        ends = np.cumsum(tokens + 2)
        begins = ends - tokens - 2
        wrapped = np.empty(len(flat) + 2 * len(tokens), np.int64)
        inside = np.ones(len(wrapped), bool)
        inside[begins] = inside[ends - 1] = False
        wrapped[begins], wrapped[ends - 1] = self._vocabulary.beginning, self._vocabulary.end
        wrapped[inside] = flat
        return wrapped


def _calls(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Group pieces of text into calls of the tokenizer."""
    call: list[str] = []
    characters = 0
    for piece in pieces:
        call.append(piece)
        characters += len(piece)
        if characters >= CALL_CHARACTERS:
            yield call
            call, characters = [], 0
    if call:
        yield call


def _offsets(counts: np.ndarray | list[int]) -> np.ndarray:
    """Return where each group begins and where the last ends; int64 of shape [groups + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _unusable(
    documents: list[Document], read: Iterable[tuple[int, bytes | UserError]]
) -> tuple[dict[int, tuple[str, str]], dict[int, list[DroppedImageError]]]:
    """Find what cannot be used because of images.

    Args:
        read: index of an image's document, and its fingerprint or why there is none.

    Returns:
        By index of a document, why it is not used and what drops it, as in `Rejected`; and the
        images that are dropped.
    """
    reasons: dict[int, tuple[str, str]] = {}
    dropped: dict[int, list[DroppedImageError]] = {}
    for index, found in read:
        if isinstance(found, DroppedImageError):
            dropped.setdefault(int(index), []).append(found)
        elif isinstance(found, UserError):
            reasons.setdefault(int(index), (str(found), ""))
    for index, images in dropped.items():
        segments = documents[index].segments
        texts = sum(isinstance(part, str) for part in segments)
        if drops_document(texts <= 1, len(segments) - texts, len(images)):
            reasons.setdefault(index, (str(images[0]), images[0].rejected.dropped_by))
    return reasons, dropped


def _separate(
    chunk: Chunk, reasons: dict[int, tuple[str, str]]
) -> tuple[list[Document], list[Rejected]]:
    """Separate documents from rejected ones; `reasons` rejects documents by their index."""
    if len(chunk.documents) == len(chunk.rows) and not reasons:
        return chunk.documents, []
    documents: list[Document] = []
    rejected: list[Rejected] = []
    index = 0
    for row in chunk.rows:
        if isinstance(row, Rejected):
            rejected.append(row)
            continue
        if reason := reasons.get(index):
            rejected.append(Rejected(row.row or row.name, *reason))
        else:
            documents.append(row)
        index += 1
    return documents, rejected


class _CodecQueue:
    """Encodes the images of a chunk in batches; equal images are encoded once."""

    def __init__(
        self,
        encode: Callable[[list[np.ndarray]], list[np.ndarray]],
        thread: ThreadPoolExecutor | None,
    ) -> None:
        self._encode, self._thread = encode, thread
        self._batch: dict[bytes, np.ndarray] = {}
        self._running: deque[tuple[list[bytes], Future[list[np.ndarray]]]] = deque()
        self._encoded: dict[bytes, np.ndarray] = {}
        self._seen: set[bytes] = set()

    def add(self, pixels: Pixels) -> None:
        """Add an image; waits if too many batches are pending."""
        if pixels.fingerprint in self._seen:
            return
        self._seen.add(pixels.fingerprint)
        self._batch[pixels.fingerprint] = pixels.values
        if len(self._batch) == BATCH_IMAGES:
            self._start_batch()
        while len(self._running) > BATCHES_AHEAD:
            self._collect()

    def take(self) -> dict[bytes, np.ndarray]:
        """Return the ids of the images since the last call, by fingerprint, boundaries included."""
        if self._batch:
            self._start_batch()
        while self._running:
            self._collect()
        encoded, self._encoded, self._seen = self._encoded, {}, set()
        return encoded

    def _start_batch(self) -> None:
        fingerprints, values = list(self._batch), list(self._batch.values())
        self._batch = {}
        if self._thread is None:
            self._encoded.update(zip(fingerprints, self._encode(values), strict=True))
        else:
            self._running.append((fingerprints, self._thread.submit(self._encode, values)))

    def _collect(self) -> None:
        fingerprints, running = self._running.popleft()
        self._encoded.update(zip(fingerprints, running.result(), strict=True))


def _delay(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield the same items, each after `count` further ones were taken from the iterable."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting
