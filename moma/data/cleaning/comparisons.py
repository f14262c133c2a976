"""The comparisons that the keys of the sources ask for, of the signatures of all of them.

While they run, memory holds 24 bytes for each text and 53 for each image, up to 32 more for each
item of the comparison in progress, and 24 for each band that an item shares with others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moma.data.cleaning.config import CleaningConfig
from moma.data.cleaning.duplicates import Comparison, ImageTable, image_bands, text_bands
from moma.data.cleaning.signatures import IMAGE, TEXT, Signatures

# A near duplicate shares several bands, and rarely so common ones alone.
_MAX_COMPARED = 64


class Piece(NamedTuple):
    """The signatures of a part, among those of all sources.

    Attributes:
        config: of its source.
        first: number of its first document, counted over all sources.
        signatures: of its documents.
    """

    config: CleaningConfig
    first: int
    signatures: Signatures


def make_comparisons(pieces: Sequence[Piece]) -> tuple[list[Comparison], ImageTable]:
    """Return the comparisons, those of texts first, and the images that they compare."""
    comparisons = []
    if exact := [piece for piece in pieces if piece.config.duplicate_texts]:
        texts = _join([piece.signatures.texts for piece in exact], exact, TEXT)
        comparisons.append(_equal("duplicate_texts", texts["document"], None, texts["hash"]))
    near = [piece for piece in pieces if piece.config.near_duplicate_texts]
    # Texts are compared by n-grams of the same length.
    for words in sorted({piece.config.near_duplicate_ngram for piece in near}):
        same = [piece for piece in near if piece.config.near_duplicate_ngram == words]
        comparisons.append(_similar_texts(same))
    records = _join([piece.signatures.images for piece in pieces], pieces, IMAGE)
    images = ImageTable(records["document"], records["number"], records["single"])
    lengths = [len(piece.signatures.images) for piece in pieces]
    equal = np.repeat([piece.config.duplicate_images for piece in pieces], lengths)
    if equal.any():
        rows = np.flatnonzero(equal)
        documents, hashes = records["document"][rows], records["hash"][rows]
        comparisons.append(_equal("duplicate_images", documents, rows, hashes))
    # −1: its source's images are not compared.
    distances = [
        -1 if piece.config.near_duplicate_images is None else piece.config.near_duplicate_images
        for piece in pieces
    ]
    distance = np.repeat(distances, lengths)
    if (distance >= 0).any():
        rows = np.flatnonzero(distance >= 0)
        comparisons.append(_similar_images(records, rows, distance[rows]))
    return comparisons, images


def _join(records: Sequence[np.ndarray], pieces: Sequence[Piece], dtype: np.dtype) -> np.ndarray:
    """Concatenate the records of pieces, with documents counted over all sources."""
    joined = np.concatenate([np.empty(0, dtype), *records])
    lengths = [*map(len, records)]
    joined["document"] += np.repeat([piece.first for piece in pieces], lengths)
    return joined


def _equal(
    key: str, documents: np.ndarray, images: np.ndarray | None, hashes: np.ndarray
) -> Comparison:
    """Compare texts or images by their hashes, uint64 [items, 2]."""

    def matches(item: int, others: np.ndarray) -> np.ndarray:
        return (hashes[others] == hashes[item]).all(axis=1)

    return Comparison(key, documents, images, iter([hashes[:, 0].copy()]), matches)


def _similar_texts(pieces: Sequence[Piece]) -> Comparison:
    records = _join([piece.signatures.texts for piece in pieces], pieces, TEXT)
    minhash = [piece.signatures.minhash for piece in pieces]
    ends = np.cumsum([*map(len, minhash)])
    begins = ends - [*map(len, minhash)]
    thresholds = [piece.config.near_duplicate_texts or 1.0 for piece in pieces]

    def matches(item: int, others: np.ndarray) -> np.ndarray:
        own_piece, *pieces_of_others = np.searchsorted(ends, [item, *others], "right").tolist()
        own = minhash[own_piece][item - begins[own_piece]]
        similarity = np.empty(len(others))
        for piece in {*pieces_of_others}:
            here = np.equal(pieces_of_others, piece)
            similarity[here] = (minhash[piece][others[here] - begins[piece]] == own).mean(axis=1)
        return similarity >= thresholds[own_piece]

    bands = text_bands(minhash, min(thresholds))
    documents = records["document"].copy()
    return Comparison("near_duplicate_texts", documents, None, bands, matches, _MAX_COMPARED)


def _similar_images(records: np.ndarray, rows: np.ndarray, distances: np.ndarray) -> Comparison:
    hashes = records["perceptual"][rows]

    def matches(item: int, others: np.ndarray) -> np.ndarray:
        differing = np.bitwise_count(hashes[others] ^ hashes[item])
        return differing <= distances[item]

    bands = image_bands(hashes, int(distances.max()))
    return Comparison("near_duplicate_images", records["document"][rows], rows, bands, matches)
