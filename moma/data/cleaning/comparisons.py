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


class PartSignatures(NamedTuple):
    """The signatures of a part, among those of all sources.

    Attributes:
        config: of its source.
        first: number of its first document, counted over all sources.
        signatures: of its documents.
    """

    config: CleaningConfig
    first: int
    signatures: Signatures


def make_comparisons(parts: Sequence[PartSignatures]) -> tuple[list[Comparison], ImageTable]:
    """Return the comparisons, those of texts first, and the images that they compare."""
    comparisons = []
    if exact := [part for part in parts if part.config.duplicate_texts]:
        texts = _join([part.signatures.texts for part in exact], exact, TEXT)
        comparisons.append(_equal("duplicate_texts", texts["document"], None, texts["hash"]))
    near = [part for part in parts if part.config.near_duplicate_texts]
    # Texts are compared by n-grams of the same length.
    for words in sorted({part.config.near_duplicate_ngram for part in near}):
        same = [part for part in near if part.config.near_duplicate_ngram == words]
        comparisons.append(_similar_texts(same))
    records = _join([part.signatures.images for part in parts], parts, IMAGE)
    images = ImageTable(records["document"], records["number"], records["single"])
    lengths = [len(part.signatures.images) for part in parts]
    equal = np.repeat([part.config.duplicate_images for part in parts], lengths)
    if equal.any():
        rows = np.flatnonzero(equal)
        documents, hashes = records["document"][rows], records["hash"][rows]
        comparisons.append(_equal("duplicate_images", documents, rows, hashes))
    # −1: its source's images are not compared.
    distances = [
        -1 if part.config.near_duplicate_images is None else part.config.near_duplicate_images
        for part in parts
    ]
    distance = np.repeat(distances, lengths)
    if (distance >= 0).any():
        rows = np.flatnonzero(distance >= 0)
        comparisons.append(_similar_images(records, rows, distance[rows]))
    return comparisons, images


def _join(
    records: Sequence[np.ndarray], parts: Sequence[PartSignatures], dtype: np.dtype
) -> np.ndarray:
    """Concatenate the records of parts, with documents counted over all sources."""
    joined = np.concatenate([np.empty(0, dtype), *records])
    lengths = [*map(len, records)]
    joined["document"] += np.repeat([part.first for part in parts], lengths)
    return joined


def _equal(
    key: str, documents: np.ndarray, images: np.ndarray | None, hashes: np.ndarray
) -> Comparison:
    """Compare texts or images by their hashes, uint64 [items, 2]."""

    def matches(item: int, others: np.ndarray) -> np.ndarray:
        return (hashes[others] == hashes[item]).all(axis=1)

    return Comparison(key, documents, images, iter([hashes[:, 0].copy()]), matches)


def _similar_texts(parts: Sequence[PartSignatures]) -> Comparison:
    records = _join([part.signatures.texts for part in parts], parts, TEXT)
    minhash = [part.signatures.minhash for part in parts]
    ends = np.cumsum([*map(len, minhash)])
    begins = ends - [*map(len, minhash)]
    thresholds = [part.config.near_duplicate_texts or 1.0 for part in parts]

    def matches(item: int, others: np.ndarray) -> np.ndarray:
        own_part, *parts_of_others = np.searchsorted(ends, [item, *others], "right").tolist()
        own = minhash[own_part][item - begins[own_part]]
        similarity = np.empty(len(others))
        for part in {*parts_of_others}:
            here = np.equal(parts_of_others, part)
            similarity[here] = (minhash[part][others[here] - begins[part]] == own).mean(axis=1)
        return similarity >= thresholds[own_part]

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
