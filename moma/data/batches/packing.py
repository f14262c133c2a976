"""Exactly balanced packing: documents → rows with a fixed number of images.

MoMa balances text and images in expectation (§3); here every micro-batch holds the same number
of images, so that experts of each modality get the same work on every rank and step.

    with_images documents ─┐
                        ├→ `Packer.pack()` → one micro-batch, `Batch`
    text-only documents ┘

Each row has a quota of images. Space for them is reserved first; what is left, the row's slack,
is for text. An image is placed with the text that leads up to it in its document, if that text
leaves every image still to come its fair share of the slack. A document that cannot go on waits
for a later row; text too long for any fair share is used as filling ahead of its image. Then
the rest of the row is filled: text after images, then text-only documents, cut where the row
ends and continued later.

Array names: B rows, S positions.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moma.errors import UserError
from moma.vocabulary import Vocabulary

# What the loss ignores: torch's default `ignore_index`.
NO_LABEL = -100

# So many documents may be open at once before packing gives up.
MAX_OPEN_DOCUMENTS = 10_000


class EncodedDocument(NamedTuple):
    """A document's token ids and where they come from.

    Attributes:
        source: name of the source.
        row: the document's row in the source's shard.
        ids: unsigned integers of shape [tokens], images wrapped in their boundaries.
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
            document's last token and on padding. They are shifted already: never shift them again.
        documents_BS: number of the piece of a document within its row; −1 on padding.
        positions_BS: position inside the piece, from 0; 0 on padding.
        images: number of images.
        padding: number of padding positions.
        origins: for each row, source and shard row of the document of each of its pieces, as
            `documents_BS` numbers them; empty where nobody knows.
    """

    tokens_BS: np.ndarray
    labels_BS: np.ndarray
    documents_BS: np.ndarray
    positions_BS: np.ndarray
    images: int
    padding: int
    origins: tuple[tuple[tuple[str, int], ...], ...] = ()


def image_budget(
    micro_batch_size: int, sequence_length: int, share: float, vocabulary: Vocabulary
) -> int:
    """Number of images that make up `share` of a micro-batch's positions.

    Raises:
        UserError: it is no whole number (the message gives the nearest shares that are), or so
            many images do not fit.
    """
    size, codes = micro_batch_size * sequence_length, vocabulary.codes_per_image
    exact = share * size / codes
    most = micro_batch_size * (sequence_length // vocabulary.image_span)
    budget = round(exact)
    # A share such as 0.3333 stands for a third.
    if abs(exact - budget) <= 1e-3 and budget <= most:
        return budget
    below, above = min(int(exact), most), min(int(exact) + 1, most)
    choices = " or ".join(
        f"{count * codes / size:.6g} ({count} images)" for count in sorted({below, above})
    )
    raise UserError(
        f"image_share {share:g} of {micro_batch_size} sequences of {sequence_length} is "
        f"{exact:.6g} images of "
        f"{codes} codes; choose {choices}, or another micro_batch_size and sequence_length "
        f"(a sequence holds at most {sequence_length // vocabulary.image_span} images)"
    )


def empty_batch(micro_batch_size: int, sequence_length: int, vocabulary: Vocabulary) -> Batch:
    """A micro-batch of padding alone: for a rank that has run out of documents before others."""
    shape = (micro_batch_size, sequence_length)
    return Batch(
        tokens_BS=np.full(shape, vocabulary.padding, dtype=np.int64),
        labels_BS=np.full(shape, NO_LABEL, dtype=np.int64),
        documents_BS=np.full(shape, -1, dtype=np.int64),
        positions_BS=np.zeros(shape, dtype=np.int64),
        images=0,
        padding=micro_batch_size * sequence_length,
    )


class Packer:
    """Packs two streams of documents into micro-batches with a fixed number of images.

    No token is lost or shown twice, and a document's tokens keep their order. A stream that ends
    leaves the packer with fewer images, or with padding.
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
            micro_batch_size: sequences of a micro-batch (B).
            sequence_length: positions of a row (S).
            images: images of a micro-batch, from `image_budget`.
            vocabulary: the ids.
            with_images: documents with at least one image; not read if `images` is 0.
            text: documents without images.
            max_open_documents: how many documents may be open at once.
        """
        self._micro_batch_size, self._row_length, self._images = (
            micro_batch_size,
            sequence_length,
            images,
        )
        self._vocabulary = vocabulary
        self._with_images, self._text = with_images, text
        self._patience = max_open_documents
        fullest = -(-images // micro_batch_size)
        # Text that any row grants to an image: longer text never fits beside it for certain.
        self._fair = _Row(sequence_length, fullest, vocabulary.image_span).fair
        self._packed = 0
        self._waiting: list[DocumentCursor] = []  # documents with an image still to come
        self._tails: list[DocumentCursor] = []  # begun documents with nothing but text to come

    @property
    def open_documents(self) -> tuple[int, int]:
        """Documents that were read but not packed to their end: with images, text-only."""
        with_images = sum(reading.images > 0 for reading in self._tails) + len(self._waiting)
        return with_images, len(self._tails) + len(self._waiting) - with_images

    def pack(self) -> Batch:
        """The next micro-batch.

        Raises:
            UserError: the documents bring more text with each image than the sequences have room
            for.
        """
        batch = empty_batch(self._micro_batch_size, self._row_length, self._vocabulary)
        # Without shuffling, images would always stand at the start of a row.
        order = np.random.default_rng(self._packed)
        images = filled = 0
        origins = []
        for number, quota in enumerate(self._quotas()):
            row = _Row(self._row_length, quota, self._vocabulary.image_span)
            self._place_images(row)
            self._place_text(row)
            pieces = row.pieces()
            pieces = [pieces[at] for at in order.permutation(len(pieces))]
            _write_sequence(batch, number, pieces)
            origins.append(tuple((piece.source, piece.row) for piece in pieces))
            images += row.images
            filled += sum(piece.stop - piece.start for piece in pieces)
        self._packed += 1
        self._check_open()
        return Batch(
            batch.tokens_BS,
            batch.labels_BS,
            batch.documents_BS,
            batch.positions_BS,
            images=images,
            padding=batch.padding - filled,
            origins=tuple(origins),
        )

    def get_state(self) -> dict[str, Any]:
        """Which documents are open and how far each has been packed; ready for JSON."""
        return {
            "packed": self._packed,
            "waiting": [reading.reference() for reading in self._waiting],
            "tails": [reading.reference() for reading in self._tails],
        }

    def set_state(self, state: dict[str, Any], fetch: Callable[[str, int], np.ndarray]) -> None:
        """Go on from a state.

        Args:
            state: from `get_state`.
            fetch: source and row → the document's ids.
        """

        def reopen(references: list[list[Any]]) -> list[DocumentCursor]:
            return [
                self._open(EncodedDocument(source, row, fetch(source, row)), offset)
                for source, row, offset in references
            ]

        self._packed = state["packed"]
        self._waiting, self._tails = reopen(state["waiting"]), reopen(state["tails"])

    def _quotas(self) -> list[int]:
        """Images of each row: as even as possible, the remainder moving from row to row."""
        each, rest = divmod(self._images, self._micro_batch_size)
        return [
            each + ((row + self._packed) % self._micro_batch_size < rest)
            for row in range(self._micro_batch_size)
        ]

    def _open(self, document: EncodedDocument, offset: int = 0) -> "DocumentCursor":
        return DocumentCursor(document, self._vocabulary.begin_image, offset)

    def _place_images(self, row: "_Row") -> None:
        """Meet the row's quota, or release its space if the documents have run out."""
        while row.missing:
            reading = next(filter(row.fits, self._waiting), None) or self._pull(row)
            if reading is None:
                row.release()
                return
            while row.missing and reading.images_left and row.fits(reading):
                row.place_image(reading)
            if not reading.images_left:
                self._waiting.remove(reading)
                # A caption after its image stays with it, as far as it is fair to the others.
                row.place_text(reading, min(reading.text_ahead, row.unclaimed))

    def _pull(self, row: "_Row") -> "DocumentCursor | None":
        """Open with_images documents until one fits the row; None if there are no more."""
        for document in self._with_images:
            reading = self._open(document)
            self._waiting.append(reading)
            if row.fits(reading):
                return reading
            self._check_open()
        return None

    def _place_text(self, row: "_Row") -> None:
        """Fill the row: first what belongs to its images, then older text, then new text."""
        for reading in [*row.readings, *self._tails, *self._waiting]:
            # The text nearest to an image is kept for the row in which the image stands.
            keep = self._fair if reading.images_left else 0
            row.place_text(reading, min(max(reading.text_ahead - keep, 0), row.slack))
        while row.slack and (document := next(self._text, None)) is not None:
            reading = self._open(document)
            row.place_text(reading, min(reading.text_ahead, row.slack))
        begun = dict.fromkeys([*self._tails, *row.readings])
        self._tails = [
            reading for reading in begun if reading.text_ahead and not reading.images_left
        ]

    def _check_open(self) -> None:
        """Give up when documents open faster than their text finds room."""
        still_open = [*self._waiting, *self._tails]
        if len(still_open) < self._patience:
            return
        lengths = sum(len(reading.document.ids) for reading in still_open)
        images = max(sum(reading.images for reading in still_open), 1)
        raise UserError(
            f"{len(still_open)} documents wait to be packed further: they bring "
            f"{lengths / images - self._vocabulary.image_span:.0f} text tokens with each "
            f"image, but the fullest of {self._micro_batch_size} sequences of {self._row_length} "
            f"have room for "
            f"{self._fair} beside each of theirs ({self._images} images in all); "
            "lower image_share, raise sequence_length or shorten the texts beside images"
        )


class DocumentCursor:
    """A document that is being packed: how far, and what comes next."""

    def __init__(self, document: EncodedDocument, begin_image: int, offset: int) -> None:
        self.document = document
        self.offset = offset
        starts = np.flatnonzero(document.ids == begin_image).tolist()
        self.images = len(starts)
        # Where text ends: at each image, and at the document's end.
        self._text_ends = [*starts, len(document.ids)]
        self._next = bisect_left(self._text_ends, offset)

    @property
    def images_left(self) -> int:
        """Images still to come."""
        return self.images - self._next

    @property
    def text_ahead(self) -> int:
        """Text tokens before the next image, or before the end."""
        return self._text_ends[self._next] - self.offset

    def pass_image(self, span: int) -> None:
        """Go on behind the next image, which covers `span` tokens."""
        self.offset = self._text_ends[self._next] + span
        self._next += 1

    def reference(self) -> list[Any]:
        """Source, row and offset, ready for JSON."""
        return [self.document.source, self.document.row, self.offset]


class _Piece(NamedTuple):
    source: str
    row: int
    ids: np.ndarray
    start: int
    stop: int


class _Row:
    """The space of one row while it is given away.

    Attributes:
        missing: images still to be placed; their space is reserved.
        images: images placed.
        slack: positions that are neither used nor reserved.
        fair: text that each image of the quota may bring along in any case.
        readings: the documents in the row, each with the offset at which its piece begins.
    """

    def __init__(self, length: int, quota: int, span: int) -> None:
        self.missing = quota
        self.images = 0
        self.slack = length - quota * span
        self.fair = self.slack // quota if quota else 0
        self.readings: dict[DocumentCursor, int] = {}
        self._span = span

    @property
    def unclaimed(self) -> int:
        """Slack beyond the fair share of every missing image."""
        return self.slack - self.missing * self.fair

    def fits(self, reading: DocumentCursor) -> bool:
        """Whether the next image, with the text before it, may be placed."""
        return reading.text_ahead <= self.unclaimed + self.fair

    def place_image(self, reading: DocumentCursor) -> None:
        """Location the document's next image and the text before it."""
        self.place_text(reading, reading.text_ahead)
        self.readings.setdefault(reading, reading.offset)
        reading.pass_image(self._span)
        self.missing -= 1
        self.images += 1

    def place_text(self, reading: DocumentCursor, tokens: int) -> None:
        """Location so many of the document's next text tokens."""
        if tokens:
            self.readings.setdefault(reading, reading.offset)
            reading.offset += tokens
            self.slack -= tokens

    def release(self) -> None:
        """Give up the images that are missing; their space becomes slack."""
        self.slack += self.missing * self._span
        self.missing = 0

    def pieces(self) -> list[_Piece]:
        """What the row holds: one piece a document, since its tokens in the row are adjacent."""
        return [
            _Piece(*reading.document, start, reading.offset)
            for reading, start in self.readings.items()
        ]


def _write_sequence(batch: Batch, row: int, pieces: list[_Piece]) -> None:
    """Write a row's pieces one behind the other."""
    at = 0
    for number, (_, _, ids, start, stop) in enumerate(pieces):
        end = at + stop - start
        batch.tokens_BS[row, at:end] = ids[start:stop]
        # One id beyond the piece; at the document's end there is none and the last label stays.
        following = ids[start + 1 : stop + 1]
        batch.labels_BS[row, at : at + len(following)] = following
        batch.documents_BS[row, at:end] = number
        batch.positions_BS[row, at:end] = np.arange(end - at)
        at = end
