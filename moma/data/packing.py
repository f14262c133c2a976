"""Exactly balanced packing: documents → rows with a fixed number of pictures.

MoMa balances text and pictures in expectation (§3); here every micro-batch holds the same number
of pictures, so that experts of each modality get the same work on every rank and step.

    pictured documents ─┐
                        ├→ `Packer.pack()` → one micro-batch, `Batch`
    text-only documents ┘

Each row has a quota of pictures. Space for them is reserved first; what is left, the row's slack,
is for text. A picture is placed with the text that leads up to it in its document, if that text
leaves every picture still to come its fair share of the slack. A document that cannot go on waits
for a later row; text too long for any fair share is used as filling ahead of its picture. Then
the rest of the row is filled: text after pictures, then text-only documents, cut where the row
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
PATIENCE = 10_000


class Encoded(NamedTuple):
    """A document's token ids and where they come from.

    Attributes:
        source: name of the source.
        row: the document's row in the source's shard.
        ids: unsigned integers of shape [tokens], pictures wrapped in their boundaries.
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
        pictures: number of pictures.
        padding: number of padding positions.
        origins: for each row, source and shard row of the document of each of its pieces, as
            `documents_BS` numbers them; empty where nobody knows.
    """

    tokens_BS: np.ndarray
    labels_BS: np.ndarray
    documents_BS: np.ndarray
    positions_BS: np.ndarray
    pictures: int
    padding: int
    origins: tuple[tuple[tuple[str, int], ...], ...] = ()


def picture_budget(rows: int, row_length: int, share: float, vocabulary: Vocabulary) -> int:
    """Number of pictures that make up `share` of a micro-batch's positions.

    Raises:
        UserError: it is no whole number (the message gives the nearest shares that are), or so
            many pictures do not fit.
    """
    size, codes = rows * row_length, vocabulary.codes_per_image
    exact = share * size / codes
    most = rows * (row_length // vocabulary.image_span)
    budget = round(exact)
    # A share such as 0.3333 stands for a third.
    if abs(exact - budget) <= 1e-3 and budget <= most:
        return budget
    below, above = min(int(exact), most), min(int(exact) + 1, most)
    choices = " or ".join(
        f"{count * codes / size:.6g} ({count} pictures)" for count in sorted({below, above})
    )
    raise UserError(
        f"picture_share {share:g} of {rows} rows of {row_length} is {exact:.6g} pictures of "
        f"{codes} codes; choose {choices}, or other rows and row_length "
        f"(a row holds at most {row_length // vocabulary.image_span} pictures)"
    )


def empty_batch(rows: int, row_length: int, vocabulary: Vocabulary) -> Batch:
    """A micro-batch of padding alone: for a rank that has run out of documents before others."""
    shape = (rows, row_length)
    return Batch(
        tokens_BS=np.full(shape, vocabulary.padding, dtype=np.int64),
        labels_BS=np.full(shape, NO_LABEL, dtype=np.int64),
        documents_BS=np.full(shape, -1, dtype=np.int64),
        positions_BS=np.zeros(shape, dtype=np.int64),
        pictures=0,
        padding=rows * row_length,
    )


class Packer:
    """Packs two streams of documents into micro-batches with a fixed number of pictures.

    No token is lost or shown twice, and a document's tokens keep their order. A stream that ends
    leaves the packer with fewer pictures, or with padding.
    """

    def __init__(
        self,
        rows: int,
        row_length: int,
        pictures: int,
        vocabulary: Vocabulary,
        pictured: Iterator[Encoded],
        text: Iterator[Encoded],
        patience: int = PATIENCE,
    ) -> None:
        """Set up the packer.

        Args:
            rows: rows of a micro-batch (B).
            row_length: positions of a row (S).
            pictures: pictures of a micro-batch, from `picture_budget`.
            vocabulary: the ids.
            pictured: documents with at least one picture; not read if `pictures` is 0.
            text: documents without pictures.
            patience: how many documents may be open at once.
        """
        self._rows, self._row_length, self._pictures = rows, row_length, pictures
        self._vocabulary = vocabulary
        self._pictured, self._text = pictured, text
        self._patience = patience
        fullest = -(-pictures // rows)
        # Text that any row grants to a picture: longer text never fits beside it for certain.
        self._fair = _Row(row_length, fullest, vocabulary.image_span).fair
        self._packed = 0
        self._waiting: list[_Reading] = []  # documents with a picture still to come
        self._tails: list[_Reading] = []  # begun documents with nothing but text to come

    @property
    def open_documents(self) -> tuple[int, int]:
        """Documents that were read but not packed to their end: with pictures, text-only."""
        pictured = sum(reading.pictures > 0 for reading in self._tails) + len(self._waiting)
        return pictured, len(self._tails) + len(self._waiting) - pictured

    def pack(self) -> Batch:
        """The next micro-batch.

        Raises:
            UserError: the documents bring more text with each picture than the rows have room for.
        """
        batch = empty_batch(self._rows, self._row_length, self._vocabulary)
        # Without shuffling, pictures would always stand at the start of a row.
        order = np.random.default_rng(self._packed)
        pictures = filled = 0
        origins = []
        for number, quota in enumerate(self._quotas()):
            row = _Row(self._row_length, quota, self._vocabulary.image_span)
            self._place_pictures(row)
            self._place_text(row)
            pieces = row.pieces()
            pieces = [pieces[at] for at in order.permutation(len(pieces))]
            _lay_out(batch, number, pieces)
            origins.append(tuple((piece.source, piece.row) for piece in pieces))
            pictures += row.pictures
            filled += sum(piece.stop - piece.start for piece in pieces)
        self._packed += 1
        self._check_open()
        return Batch(
            batch.tokens_BS,
            batch.labels_BS,
            batch.documents_BS,
            batch.positions_BS,
            pictures=pictures,
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

        def reopen(references: list[list[Any]]) -> list[_Reading]:
            return [
                self._open(Encoded(source, row, fetch(source, row)), offset)
                for source, row, offset in references
            ]

        self._packed = state["packed"]
        self._waiting, self._tails = reopen(state["waiting"]), reopen(state["tails"])

    def _quotas(self) -> list[int]:
        """Pictures of each row: as even as possible, the remainder moving from row to row."""
        each, rest = divmod(self._pictures, self._rows)
        return [each + ((row + self._packed) % self._rows < rest) for row in range(self._rows)]

    def _open(self, document: Encoded, offset: int = 0) -> "_Reading":
        return _Reading(document, self._vocabulary.begin_image, offset)

    def _place_pictures(self, row: "_Row") -> None:
        """Meet the row's quota, or release its space if the documents have run out."""
        while row.missing:
            reading = next(filter(row.fits, self._waiting), None) or self._pull(row)
            if reading is None:
                row.release()
                return
            while row.missing and reading.pictures_left and row.fits(reading):
                row.place_picture(reading)
            if not reading.pictures_left:
                self._waiting.remove(reading)
                # A caption after its picture stays with it, as far as it is fair to the others.
                row.place_text(reading, min(reading.text_ahead, row.unclaimed))

    def _pull(self, row: "_Row") -> "_Reading | None":
        """Open pictured documents until one fits the row; None if there are no more."""
        for document in self._pictured:
            reading = self._open(document)
            self._waiting.append(reading)
            if row.fits(reading):
                return reading
            self._check_open()
        return None

    def _place_text(self, row: "_Row") -> None:
        """Fill the row: first what belongs to its pictures, then older text, then new text."""
        for reading in [*row.readings, *self._tails, *self._waiting]:
            # The text nearest to a picture is kept for the row in which the picture stands.
            keep = self._fair if reading.pictures_left else 0
            row.place_text(reading, min(max(reading.text_ahead - keep, 0), row.slack))
        while row.slack and (document := next(self._text, None)) is not None:
            reading = self._open(document)
            row.place_text(reading, min(reading.text_ahead, row.slack))
        begun = dict.fromkeys([*self._tails, *row.readings])
        self._tails = [
            reading for reading in begun if reading.text_ahead and not reading.pictures_left
        ]

    def _check_open(self) -> None:
        """Give up when documents open faster than their text finds room."""
        still_open = [*self._waiting, *self._tails]
        if len(still_open) < self._patience:
            return
        lengths = sum(len(reading.document.ids) for reading in still_open)
        pictures = max(sum(reading.pictures for reading in still_open), 1)
        raise UserError(
            f"{len(still_open)} documents wait to be packed further: they bring "
            f"{lengths / pictures - self._vocabulary.image_span:.0f} text tokens with each "
            f"picture, but the fullest of {self._rows} rows of {self._row_length} have room for "
            f"{self._fair} beside each of theirs ({self._pictures} pictures in all); "
            "lower picture_share, raise row_length or shorten the texts beside pictures"
        )


class _Reading:
    """A document that is being packed: how far, and what comes next."""

    def __init__(self, document: Encoded, begin_image: int, offset: int) -> None:
        self.document = document
        self.offset = offset
        starts = np.flatnonzero(document.ids == begin_image).tolist()
        self.pictures = len(starts)
        # Where text ends: at each picture, and at the document's end.
        self._text_ends = [*starts, len(document.ids)]
        self._next = bisect_left(self._text_ends, offset)

    @property
    def pictures_left(self) -> int:
        """Pictures still to come."""
        return self.pictures - self._next

    @property
    def text_ahead(self) -> int:
        """Text tokens before the next picture, or before the end."""
        return self._text_ends[self._next] - self.offset

    def pass_picture(self, span: int) -> None:
        self.offset = self._text_ends[self._next] + span
        self._next += 1

    def reference(self) -> list[Any]:
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
        missing: pictures still to be placed; their space is reserved.
        pictures: pictures placed.
        slack: positions that are neither used nor reserved.
        fair: text that each picture of the quota may bring along in any case.
        readings: the documents in the row, each with the offset at which its piece begins.
    """

    def __init__(self, length: int, quota: int, span: int) -> None:
        self.missing = quota
        self.pictures = 0
        self.slack = length - quota * span
        self.fair = self.slack // quota if quota else 0
        self.readings: dict[_Reading, int] = {}
        self._span = span

    @property
    def unclaimed(self) -> int:
        """Slack beyond the fair share of every missing picture."""
        return self.slack - self.missing * self.fair

    def fits(self, reading: _Reading) -> bool:
        """Whether the next picture, with the text before it, may be placed."""
        return reading.text_ahead <= self.unclaimed + self.fair

    def place_picture(self, reading: _Reading) -> None:
        """Place the document's next picture and the text before it."""
        self.place_text(reading, reading.text_ahead)
        self.readings.setdefault(reading, reading.offset)
        reading.pass_picture(self._span)
        self.missing -= 1
        self.pictures += 1

    def place_text(self, reading: _Reading, tokens: int) -> None:
        """Place so many of the document's next text tokens."""
        if tokens:
            self.readings.setdefault(reading, reading.offset)
            reading.offset += tokens
            self.slack -= tokens

    def release(self) -> None:
        """Give up the pictures that are missing; their space becomes slack."""
        self.slack += self.missing * self._span
        self.missing = 0

    def pieces(self) -> list[_Piece]:
        """What the row holds: one piece a document, since its tokens in the row are adjacent."""
        return [
            _Piece(*reading.document, start, reading.offset)
            for reading, start in self.readings.items()
        ]


def _lay_out(batch: Batch, row: int, pieces: list[_Piece]) -> None:
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
