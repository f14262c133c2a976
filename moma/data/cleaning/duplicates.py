"""Duplicates among the documents of all sources.

The result is as if the documents were read one after another, and each compared with those kept
before it: it depends neither on the order in which signatures were computed nor on processes.
Comparing all pairs would take too long: only items that share a hash in at least one of several
bands are compared (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, section 3.4). Texts
that share a hash with many others, as pages with the same boilerplate do, are compared with the
last of those only, so that the time grows in proportion to the texts.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from moma.data.cleaning.signatures import PERMUTATIONS
from moma.data.documents import drops_document

# A pair of texts of just the required similarity shares a band with at least this probability.
_RECALL = 0.99
_BLOCK = 2**16
_ENTRY = np.dtype([("document", "<i8"), ("item", "<i8"), ("group", "<i8")])


class Comparison(NamedTuple):
    """A way to compare texts or images, its items in the order of the documents.

    Attributes:
        key: the key of `clean` that drops what is found.
        documents: document of each item, int64 [items], counted over all sources.
        images: row of each item among all images, int64 [items]; None for texts.
        bands: hashes of the items, uint64 [items], band after band.
        matches: (item, other items) → which of the others it duplicates, bool [others].
        max_compared: maximum number of items of a band that an item is compared with, the last
            ones; None for all.
    """

    key: str
    documents: np.ndarray
    images: np.ndarray | None
    bands: Iterator[np.ndarray]
    matches: Callable[[int, np.ndarray], np.ndarray]
    max_compared: int | None = None


class ImageTable(NamedTuple):
    """The images of all sources, in the order of the documents.

    Attributes:
        documents: document of each, int64 [images].
        numbers: position among the document's images, int32 [images].
        single: whether its document has one text or none, bool [images].
    """

    documents: np.ndarray
    numbers: np.ndarray
    single: np.ndarray


class Duplicate(NamedTuple):
    """A document that is dropped, or one of its images.

    Attributes:
        document: counted over all sources.
        image: position among the document's images; −1 for the document.
        key: the key of `clean`.
        original: the earlier document that it duplicates.
    """

    document: int
    image: int
    key: str
    original: int


def text_bands(minhash: Sequence[np.ndarray], threshold: float) -> Iterator[np.ndarray]:
    """Yield the hashes of the bands of MinHash signatures, uint64 [texts] each.

    Args:
        minhash: the signatures of each part, uint32 [texts of the part, PERMUTATIONS].
        threshold: similarity that must be found.
    """
    rows = rows_of_band(threshold)
    for first in range(0, PERMUTATIONS - rows + 1, rows):
        yield np.concatenate([_mix(part[:, first : first + rows]) for part in minhash])


def rows_of_band(threshold: float) -> int:
    """Return the most values in a band with which a pair of this similarity is found."""
    return max(
        rows
        for rows in range(1, PERMUTATIONS + 1)
        if rows == 1 or 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= _RECALL
    )


def image_bands(perceptual: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Yield the bits of each of `distance` + 1 bands of 64-bit hashes, uint64 [images] each.

    Hashes that differ in at most `distance` bits are equal in at least one of the bands.
    """
    edges = np.linspace(0, 64, distance + 2).astype(np.uint64)
    for begin, end in pairwise(edges):
        yield (perceptual << begin) >> (begin + np.uint64(64) - end)


def find_duplicates(comparisons: Sequence[Comparison], images: ImageTable) -> Iterator[Duplicate]:
    """Yield what is dropped, in the order of the documents.

    Args:
        comparisons: those of texts before those of images.
        images: all images that have signatures.
    """
    entries = [_candidates(comparison) for comparison in comparisons]
    kept: list[dict[int, deque[int]]] = [
        defaultdict(partial(deque[int], maxlen=comparison.max_compared))
        for comparison in comparisons
    ]
    for document, found in groupby(_merge(entries), itemgetter(0)):
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for _, which, item, group in found:
            groups[which, item].append(group)
        dropped: dict[int, Duplicate] = {}
        for (which, item), own in groups.items():
            comparison = comparisons[which]
            image = -1 if comparison.images is None else int(comparison.images[item])
            if image in dropped:
                continue
            original = _original(comparison, item, {o for g in own for o in kept[which][g]})
            if original is not None:
                number = -1 if image < 0 else int(images.numbers[image])
                dropped[image] = Duplicate(document, number, comparison.key, original)
                if image < 0:
                    break
        if whole := _whole_document(dropped, document, images):
            yield whole
            continue
        yield from dropped.values()
        for (which, item), own in groups.items():
            of_image = comparisons[which].images
            if of_image is None or int(of_image[item]) not in dropped:
                for group in own:
                    kept[which][group].append(item)


def _original(comparison: Comparison, item: int, others: set[int]) -> int | None:
    """Return the first document with an item that this one duplicates."""
    if not others:
        return None
    candidates = np.array(sorted(others))
    documents = comparison.documents[candidates]
    is_match = comparison.matches(item, candidates) & (documents != comparison.documents[item])
    return int(documents[is_match.argmax()]) if is_match.any() else None


def _whole_document(
    dropped: dict[int, Duplicate], document: int, images: ImageTable
) -> Duplicate | None:
    """Return the duplicate that drops the document as a whole, if there is one."""
    if -1 in dropped or not dropped:
        return dropped.get(-1)
    begin, end = np.searchsorted(images.documents, [document, document + 1])
    if not drops_document(bool(images.single[begin]), int(end - begin), len(dropped)):
        return None
    return next(iter(dropped.values()))._replace(image=-1)


def _candidates(comparison: Comparison) -> np.ndarray:
    """Return the items that share a hash with others, once for each band where they do."""
    found = [np.empty(0, _ENTRY)]
    groups = 0
    for hashes in comparison.bands:
        order = np.argsort(hashes, kind="stable")
        in_order = hashes[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = in_order[1:] != in_order[:-1]
        # Alone: it begins a group, and so does the next one.
        shared = ~(is_first & np.append(is_first[1:], True))
        entries = np.empty(int(shared.sum()), _ENTRY)
        entries["item"] = order[shared]
        entries["document"] = comparison.documents[entries["item"]]
        entries["group"] = np.cumsum(is_first)[shared] + groups
        groups += len(order)
        found.append(entries)
    entries = np.concatenate(found)
    return entries[np.argsort(entries["document"], kind="stable")]


def _merge(entries: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int, int]]:
    """Yield document, comparison, item and group in the order of documents and comparisons."""
    documents = np.concatenate([np.empty(0, np.int64), *(each["document"] for each in entries)])
    which = np.repeat(np.arange(len(entries)), [*map(len, entries)])
    order = np.argsort(documents, kind="stable")
    begins = np.concatenate([[0], np.cumsum([*map(len, entries)])])
    for first in range(0, len(order), _BLOCK):
        for position in order[first : first + _BLOCK].tolist():
            index = int(which[position])
            document, item, group = entries[index][position - int(begins[index])].tolist()
            yield document, index, item, group


def _mix(values: np.ndarray) -> np.ndarray:
    """Return a hash of each row, uint64 [rows]."""
    mixed = np.zeros(len(values), np.uint64)
    for column in values.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(32)
    return mixed
