"""Exactly balanced packing: documents → sequences with a fixed number of images.

MoMa balances text and images in expectation (§3.1); here every micro-batch holds the same number
of images, so that the experts of each modality get the same work on every rank and in every step.

Each sequence has a quota: its number of images. The positions beside these are free, for text; the
text allowance of an image is the free positions divided by the quota. A sequence is filled in two
passes:

1. Images, each together with the text before it in its document, if that leaves every other image
   of the quota its text allowance. A document whose next image does not fit waits.
2. Text: the rest of the sequence's own documents, then of open ones, which are partly packed (of
   those with an image to come, all but the text allowance before it, so that the image will fit),
   then new documents without images.

Text is cut where the sequence ends and continues in a later one; an image is never cut.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moma.errors import UserError
from moma.vocabulary import Vocabulary

# What the loss ignores: torch's default `ignore_index`.
NO_LABEL = -100

# Documents that may be open: taken from a stream and not yet packed to their end. If there are
# more, text accumulates.
MAX_OPEN_DOCUMENTS = 10_000
# Keys of a saved state: references to documents with an image to come, and with only text to come.
_PENDING = ("pending_images", "pending_text")


class EncodedDocument(NamedTuple):
    """A document's token ids and where they are stored.

    Attributes:
        source: name of the source.
        row: the document's row in the split of the source.
        ids: unsigned integers of shape [tokens], each image between its boundary tokens.
    """

    source: str
    row: int
    ids: np.ndarray


@dataclass(frozen=True)
class Batch:
    """A micro-batch. All arrays are int64.

    Attributes:
        tokens_BS: ids.
        labels_BS: the next id of the same document, also where the document is cut; −100 at a
            document's last token and on padding. They are already shifted: do not shift them
            again.
        document_ids_BS: index of the token's piece within its sequence; −1 on padding. A piece is
            what a sequence holds of one document, and a segment of attention, which stays within
            it unless `model.attention_mask` is `causal`.
        positions_BS: position inside the piece, from 0; 0 on padding.
        images: number of images.
        padding: number of padding positions.
        origins: for each sequence, source and row of the document of each of its pieces, in
            the order of `document_ids_BS`; empty if unknown.
    """

    tokens_BS: np.ndarray
    labels_BS: np.ndarray
    document_ids_BS: np.ndarray
    positions_BS: np.ndarray
    images: int
    padding: int
    origins: tuple[tuple[tuple[str, int], ...], ...] = ()


class Piece(NamedTuple):
    """The tokens `start` … `stop` − 1 of a document, which stand together in a sequence."""

    document: EncodedDocument
    start: int
    stop: int


class Layout(NamedTuple):
    """What a micro-batch holds.

    Attributes:
        sequences: the pieces of each sequence, in order.
        images: number of images.
        padding: number of positions that no piece fills.
    """

    sequences: list[list[Piece]]
    images: int
    padding: int


class Packer:
    """Packs two streams of documents into micro-batches with a fixed number of images.

    No token is lost or repeated, and a document's tokens keep their order. After the end of a
    stream micro-batches hold fewer images, or padding.
    """

    def __init__(
        self,
        micro_batch_size: int,
        sequence_length: int,
        images: int,
        vocabulary: Vocabulary,
        with_images: Iterator[EncodedDocument],
        text: Iterator[EncodedDocument],
        max_open_documents: int = MAX_OPEN_DOCUMENTS,
    ) -> None:
        """Set up the packer.

        Args:
            micro_batch_size, sequence_length: B and S.
            images: images of a micro-batch.
            with_images: documents with at least one image; not read if `images` is 0.
            max_open_documents: maximum number of open documents, after which text accumulates.
        """
        self._micro_batch_size, self._sequence_length = micro_batch_size, sequence_length
        self._images, self._vocabulary = images, vocabulary
        self._with_images, self._text = with_images, text
        self._max_open_documents = max_open_documents
        # That of the sequence with the largest quota: longer text may never fit.
        largest_quota = -(-images // micro_batch_size)
        self._text_allowance = self._empty_sequence(largest_quota).text_allowance
        self._packed = 0
        self._pending_images: list[DocumentCursor] = []  # documents with an image to come
        self._pending_text: list[DocumentCursor] = []  # documents with only text to come

    @property
    def open_documents(self) -> int:
        """Number of documents that are not packed to their end."""
        return len(self._pending_images) + len(self._pending_text)

    def pack(self) -> Batch:
        """Return the next micro-batch.

        Raises:
            UserError: the documents have more text per image than the sequences have positions
                for.
        """
        layout = self.plan()
        shape = (self._micro_batch_size, self._sequence_length)
        batch = Batch(
            tokens_BS=np.full(shape, self._vocabulary.padding, dtype=np.int64),
            labels_BS=np.full(shape, NO_LABEL, dtype=np.int64),
            document_ids_BS=np.full(shape, -1, dtype=np.int64),
            positions_BS=np.zeros(shape, dtype=np.int64),
            images=layout.images,
            padding=layout.padding,
            origins=tuple(
                tuple((document.source, document.row) for document, _, _ in pieces)
                for pieces in layout.sequences
            ),
        )
        for index, pieces in enumerate(layout.sequences):
            _write_sequence(batch, index, pieces)
        return batch

    def plan(self) -> Layout:
        """Decide what the next micro-batch holds, without copying ids; `pack` does both.

        Raises:
            UserError: see `pack`.
        """
        # Without shuffling, images would always be at the start of a sequence. The order depends on
        # the number of the micro-batch only, so that it needs no state.
        random = np.random.default_rng(self._packed)
        sequences, images, padding = [], 0, 0
        for quota in self._quotas():
            sequence = self._empty_sequence(quota)
            self._place_images(sequence)
            self._place_text(sequence)
            pieces = sequence.pieces()
            sequences.append([pieces[index] for index in random.permutation(len(pieces))])
            images += sequence.images
            padding += sequence.free
        self._packed += 1
        self._check_open_documents()
        return Layout(sequences, images, padding)

    def get_state(self) -> dict[str, Any]:
        """Return which documents are open and how far each has been packed; ready for JSON."""
        return {
            "packed": self._packed,
            "pending_images": [cursor.reference() for cursor in self._pending_images],
            "pending_text": [cursor.reference() for cursor in self._pending_text],
        }

    def set_state(self, state: dict[str, Any], fetch: Callable[[str, int], np.ndarray]) -> None:
        """Continue from a state.

        Args:
            fetch: source and row → the document's ids.
        """
        self._packed = state["packed"]
        self._pending_images, self._pending_text = (
            [
                self._open(EncodedDocument(source, row, fetch(source, row)), offset)
                for source, row, offset in state[key]
            ]
            for key in _PENDING
        )

    def _quotas(self) -> list[int]:
        """Return the images of each sequence, as even as possible; the remainder rotates."""
        each, rest = divmod(self._images, self._micro_batch_size)
        return [
            each + ((index + self._packed) % self._micro_batch_size < rest)
            for index in range(self._micro_batch_size)
        ]

    def _empty_sequence(self, quota: int) -> "_Sequence":
        return _Sequence(self._sequence_length, quota, self._vocabulary.image_span)

    def _open(self, document: EncodedDocument, offset: int = 0) -> "DocumentCursor":
        return DocumentCursor(document, self._vocabulary.begin_image, offset)

    def _place_images(self, sequence: "_Sequence") -> None:
        """Meet the sequence's quota, or release its positions if there are no more documents."""
        while sequence.missing_images:
            cursor = next(filter(sequence.fits, self._pending_images), None)
            cursor = cursor or self._open_next(sequence)
            if cursor is None:
                sequence.release()
                return
            while sequence.missing_images and cursor.images_left and sequence.fits(cursor):
                sequence.place_image(cursor)
            if not cursor.images_left:
                self._pending_images.remove(cursor)
                # A caption after its image stays with it, if that leaves others their allowance.
                sequence.place_text(cursor, min(cursor.text_ahead, sequence.free_beyond_allowances))

    def _open_next(self, sequence: "_Sequence") -> "DocumentCursor | None":
        """Open documents with images until one fits the sequence; None if there are no more."""
        for document in self._with_images:
            cursor = self._open(document)
            self._pending_images.append(cursor)
            if sequence.fits(cursor):
                return cursor
            self._check_open_documents()
        return None

    def _place_text(self, sequence: "_Sequence") -> None:
        """Fill the sequence: text of its own documents, then of open ones, then of new ones."""
        for cursor in [*sequence.starts, *self._pending_text, *self._pending_images]:
            # The text just before an image is kept for the sequence of the image.
            keep = self._text_allowance if cursor.images_left else 0
            sequence.place_text(cursor, min(max(cursor.text_ahead - keep, 0), sequence.free))
        while sequence.free and (document := next(self._text, None)) is not None:
            cursor = self._open(document)
            sequence.place_text(cursor, min(cursor.text_ahead, sequence.free))
        self._pending_text = [
            cursor
            for cursor in dict.fromkeys([*self._pending_text, *sequence.starts])
            if cursor.text_ahead and not cursor.images_left
        ]

    def _check_open_documents(self) -> None:
        """Stop if text accumulates: documents are opened faster than they are packed."""
        if self.open_documents <= self._max_open_documents:
            return
        cursors = [*self._pending_images, *self._pending_text]
        tokens = sum(len(cursor.document.ids) for cursor in cursors)
        images = max(sum(cursor.images for cursor in cursors), 1)
        raise UserError(
            f"{len(cursors)} documents wait to be packed further: they have "
            f"{tokens / images - self._vocabulary.image_span:.0f} text tokens per image, "
            f"but {self._images} images in {self._micro_batch_size} sequences of "
            f"{self._sequence_length} leave room for {self._text_allowance} in the fullest "
            "sequence; lower image_share, raise sequence_length or shorten the texts of documents "
            "with images"
        )


def reshard_packers(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Split the open documents of all ranks' packers over another number of ranks."""
    pending = {key: [entry for state in states for entry in state[key]] for key in _PENDING}
    return [
        {"packed": states[0]["packed"]} | {key: pending[key][rank::world_size] for key in _PENDING}
        for rank in range(world_size)
    ]


class DocumentCursor:
    """A document that is being packed: how far it is packed, and what comes next."""

    def __init__(self, document: EncodedDocument, begin_image: int, offset: int) -> None:
        self.document = document
        self.offset = offset
        starts = np.flatnonzero(document.ids == begin_image).tolist()
        self.images = len(starts)
        # Where text ends: before each image, and at the document's end.
        self._text_ends = [*starts, len(document.ids)]
        self._next = bisect_left(self._text_ends, offset)

    @property
    def images_left(self) -> int:
        """Number of images to come."""
        return self.images - self._next

    @property
    def text_ahead(self) -> int:
        """Number of text tokens before the next image, or before the end."""
        return self._text_ends[self._next] - self.offset

    def skip_image(self, span: int) -> None:
        """Move past the next image, which has `span` tokens."""
        self.offset = self._text_ends[self._next] + span
        self._next += 1

    def reference(self) -> list[Any]:
        """Return source, row and offset, ready for JSON."""
        return [self.document.source, self.document.row, self.offset]


class _Sequence:
    """A sequence while it is being filled.

    Attributes:
        missing_images: images of the quota that are not placed yet; their positions are reserved.
        images: number of images placed.
        free: number of positions that are neither used nor reserved.
        text_allowance: free positions that each image of the quota may use in any case.
        starts: the documents in the sequence, each with the offset at which its piece begins.
    """

    def __init__(self, length: int, quota: int, span: int) -> None:
        self.missing_images = quota
        self.images = 0
        self.free = length - quota * span
        self.text_allowance = self.free // quota if quota else 0
        self.starts: dict[DocumentCursor, int] = {}
        self._span = span

    @property
    def free_beyond_allowances(self) -> int:
        """Free positions beyond the text allowances of the missing images."""
        return self.free - self.missing_images * self.text_allowance

    def fits(self, cursor: DocumentCursor) -> bool:
        """Return whether the document's next image may be placed, with the text before it."""
        return cursor.text_ahead <= self.free_beyond_allowances + self.text_allowance

    def place_image(self, cursor: DocumentCursor) -> None:
        """Place the document's next image and the text before it."""
        self.place_text(cursor, cursor.text_ahead)
        self.starts.setdefault(cursor, cursor.offset)
        cursor.skip_image(self._span)
        self.missing_images -= 1
        self.images += 1

    def place_text(self, cursor: DocumentCursor, tokens: int) -> None:
        """Place the document's next text tokens."""
        if tokens:
            self.starts.setdefault(cursor, cursor.offset)
            cursor.offset += tokens
            self.free -= tokens

    def release(self) -> None:
        """Turn the positions that are reserved for missing images into free ones."""
        self.free += self.missing_images * self._span
        self.missing_images = 0

    def pieces(self) -> list[Piece]:
        """Return a piece for each document, whose tokens in the sequence are adjacent."""
        starts = self.starts.items()
        return [Piece(cursor.document, start, cursor.offset) for cursor, start in starts]


def _write_sequence(batch: Batch, index: int, pieces: list[Piece]) -> None:
    """Write the pieces of a sequence one after another."""
    position = 0
    for number, (document, start, stop) in enumerate(pieces):
        end = position + stop - start
        batch.tokens_BS[index, position:end] = document.ids[start:stop]
        # The next id of each token; the document's last token has none and keeps NO_LABEL.
        following = document.ids[start + 1 : stop + 1]
        batch.labels_BS[index, position : position + len(following)] = following
        batch.document_ids_BS[index, position:end] = number
        batch.positions_BS[index, position:end] = np.arange(end - position)
        position = end
