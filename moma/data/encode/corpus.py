"""The documents that tokenizers are trained on: a sample of texts and images of the sources.

Documents and images that cannot be read are left out and counted. Only references to images are
held in memory.
"""

import hashlib
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import IO

import numpy as np
from PIL import Image
from torch import Tensor

from moma.data.cleaning.filters import make_filter
from moma.data.documents import (
    Document,
    DroppedImageError,
    ImageRef,
    Rejected,
    SourceConfig,
    SourcePart,
    held_out_share,
    is_held_out,
)
from moma.data.encode.chunks import CHUNK_DOCUMENTS, reject_unencodable
from moma.data.encode.rejected import all_held_out, no_documents, too_many_rejected
from moma.data.sources.listings import Listings
from moma.data.sources.parts import PART_BYTES
from moma.errors import StorageError, UserError, shorten
from moma.tokenizers.image.codec import preprocess

# A reference to a file is smaller; a larger one contains the image's bytes.
_MAX_REFERENCE_BYTES = 2048
# Rejected documents that are kept for each source: all documents of a source may be rejected.
MAX_REJECTED_KEPT = 1_000
# Of a source with more parts, as many are drawn at random.
MAX_PARTS = 64
# Rows that are read of a part, for each document that is drawn of it.
OVERSAMPLING = 8


class Corpus:
    """A random sample of the documents of some sources; too many rejected ones are an error.

    Of a source with more documents than are used, parts are drawn at random, and documents at
    random of the beginning of each; the sample depends on the seed and the source only. Data that
    is streamed cannot be cut: its first documents are used.

    Attributes:
        documents: number of documents that were used.
        other_documents: number of documents that were read and belong to the other split.
        rejected: the first rejected documents of each source, by its name.
        rejected_counts: number of rejected documents of each source; one that is read several
            times counts once.
        totals: documents of each source, rejected ones included, if it was read to its end.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        held_out: float,
        max_documents: int,
        max_rejected: float = 1.0,
        check_images: bool = False,
        list_rejected: Callable[[str, list[Rejected]], str] = lambda source, rejected: "",
        seed: int = 0,
        part_bytes: int = PART_BYTES,
    ):
        """Set up reading; nothing is read yet.

        Args:
            held_out: fraction held out, for sources that do not set their own.
            max_documents: maximum number of documents of each source.
            max_rejected: maximum fraction of a source's documents that may be rejected.
            check_images: whether documents with missing image files count as rejected; they are
                used nevertheless, since the file may exist when it is read.
            list_rejected: called with a source's name and rejected documents if there are too
                many; writes them somewhere and returns where, for the message.
            seed: determines which documents are drawn.
            part_bytes: approximate size of the parts that are drawn.
        """
        self._sources, self._held_out, self._max_documents = sources, held_out, max_documents
        self._max_rejected, self._check_images = max_rejected, check_images
        self._list_rejected, self._seed, self._part_bytes = list_rejected, seed, part_bytes
        self._parts: dict[str, list[SourcePart]] = {}
        self._listings = Listings()
        # Documents read of each part, and of all parts of each source.
        self._read: Counter[tuple[str, int]] = Counter()
        self._all_read: Counter[str] = Counter()
        self._ended: set[tuple[str, int]] = set()
        self.documents = self.other_documents = 0
        self.rejected: dict[str, list[Rejected]] = {}
        self.rejected_counts: Counter[str] = Counter()
        self.totals: dict[str, int] = {}

    @property
    def first_rejected(self) -> Rejected | None:
        """The first rejected document."""
        return next((row for rows in self.rejected.values() for row in rows), None)

    def require_documents(self) -> None:
        """Check that there was something to train on.

        Raises:
            UserError: there was no document, or all of them belong to the other split.
        """
        if self.documents:
            return
        if self.other_documents:
            raise all_held_out(self.other_documents)
        first = f"; the first: {self.first_rejected.message}" if self.first_rejected else ""
        raise UserError(f"there is no document to train on{first}; check the sources")

    def texts(self) -> Iterator[str]:
        """Yield the texts of the training documents.

        Raises:
            UserError: too many documents of a source were rejected.
        """
        for document in self._listings.inside(self._select(held_out=False)):
            yield from (segment for segment in document.segments if isinstance(segment, str))

    def images(self, held_out: bool) -> list[ImageRef]:
        """Return the images of the training documents or of the held-out ones.

        Raises:
            UserError: too many documents of a source were rejected.
        """
        store = _ImageStore()
        with self._listings:
            return [
                store.add(segment)
                for document in self._select(held_out)
                for segment in document.segments
                if isinstance(segment, ImageRef)
            ]

    def _select(self, held_out: bool) -> Iterator[Document]:
        for source in self._sources:
            share = held_out_share(source, self._held_out)
            apply = make_filter(source.clean)
            left = self._max_documents
            numbers = self._drawn_parts(source)
            for position, number in enumerate(numbers):
                # The first parts share the documents; if they have too few, others follow.
                quota = -(-left // max(1, min(MAX_PARTS, len(numbers)) - position))
                for drawn in self._draw(source, number, share, held_out, quota):
                    document = apply(drawn)
                    # A user's function may change what decides.
                    if isinstance(document, Document) and is_held_out(document, share) == held_out:
                        self.documents += 1
                        left -= 1
                        yield document
                if not left:
                    break
            if not self._all_read[source.name]:
                raise no_documents(source)
            if len(numbers) == sum(name == source.name for name, _ in self._ended):
                self.totals[source.name] = self._all_read[source.name]
            self._check_rejected(source.name)

    def _drawn_parts(self, source: SourceConfig) -> list[int]:
        """Return numbers of parts, in the order in which they are used."""
        if source.name not in self._parts:
            self._parts[source.name] = source.parts(self._part_bytes)
        count = len(self._parts[source.name])
        if count <= MAX_PARTS:
            return [*range(count)]
        return [int(number) for number in self._random(source.name).permutation(count)]

    def _draw(
        self, source: SourceConfig, number: int, share: float, held_out: bool, quota: int
    ) -> Iterator[Document]:
        """Yield at most `quota` documents of a split of a part, in its order."""
        if getattr(source, "streaming", False):  # reading twice would download twice
            limit, drawn = None, np.ones(quota, bool)
        else:
            limit = OVERSAMPLING * quota
            rows = islice(source.read_part(self._parts[source.name][number]), limit)
            documents = (row for row in rows if isinstance(row, Document))
            count = sum(is_held_out(document, share) == held_out for document in documents)
            drawn = np.zeros(count, bool)
            random = self._random(source.name, number, held_out)
            drawn[random.choice(count, min(quota, count), replace=False)] = True
        left, is_drawn = int(drawn.sum()), iter(drawn.tolist())
        for document in self._usable(source, number, limit):
            if is_held_out(document, share) != held_out:
                self.other_documents += 1
            elif next(is_drawn, False):
                left -= 1
                yield document
                if not left and len(drawn) >= quota:
                    return

    def _random(self, *of: object) -> np.random.Generator:
        digest = hashlib.sha256(repr((self._seed, *of)).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8]))

    def _usable(self, source: SourceConfig, number: int, limit: int | None) -> Iterator[Document]:
        """Yield the documents among the first rows of a part that can be encoded."""
        name, part, position = source.name, (source.name, number), 0
        rows = islice(source.read_part(self._parts[name][number]), limit)
        for position, row in enumerate(map(reject_unencodable, rows), 1):
            if position > self._read[part]:  # not read before
                self._read[part] = position
                self._all_read[name] += 1
                problem = row if isinstance(row, Rejected) else self._missing_image(row)
                if problem is not None:
                    self.rejected_counts[name] += 1
                    if self.rejected_counts[name] <= MAX_REJECTED_KEPT:
                        self.rejected.setdefault(name, []).append(problem)
            if isinstance(row, Document):
                yield row
            # Not sooner: a few rejected documents among the first ones may be few of all.
            if position % CHUNK_DOCUMENTS == 0:
                self._check_rejected(name)
        if limit is None or position < limit:
            self._ended.add(part)

    def _missing_image(self, document: Document) -> Rejected | None:
        """Return the document as rejected if a file of an image is missing; reads no image."""
        images = (part for part in document.segments if isinstance(part, ImageRef))
        reasons = (image.missing() for image in images if self._check_images)
        reason = next(filter(None, reasons), None)
        return None if reason is None else Rejected(document.row or document.name, reason)

    def _check_rejected(self, name: str) -> None:
        count, read = self.rejected_counts[name], self._all_read[name]
        if count <= self._max_rejected * read:
            return
        rows = self.rejected[name]
        location = self._list_rejected(name, rows)
        which = "all" if len(rows) == count else f"the first {len(rows):,}"
        listing = f" ({location} lists {which})" if location else ""
        raise too_many_rejected(name, count, read, self._max_rejected, rows, listing)


def require_training_images(
    training: Sequence[ImageRef], held_out: Sequence[ImageRef], remedy: str
) -> None:
    """Check that there are images to train a codec on.

    Args:
        training, held_out: images of the training documents and of the held-out ones.
        remedy: what to do if there is no image at all, for the message.

    Raises:
        UserError: there are none, or all of them are held out.
    """
    if held_out and not training:
        raise UserError(
            f"all {len(held_out):,} images are in held-out documents, so nothing is left to train "
            "the codec on; lower data.held_out, or the held_out of a source"
        )
    if not training:
        raise UserError(
            f"the sources have no images, so there is nothing to train a codec on; {remedy}"
        )


class _ImageStore:
    """Keeps images that contain their bytes, as those of streams do, on disk instead of in memory.

    The file has no name, so that no other process can write what is unpickled here.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def add(self, image: ImageRef) -> ImageRef:
        """Return the same image without its bytes in memory."""
        try:
            data = pickle.dumps(image.read)
        except (pickle.PicklingError, AttributeError, TypeError):  # computed rather than stored
            return image
        if len(data) <= _MAX_REFERENCE_BYTES:
            return image
        self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
        begin = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: cannot store the images that the codec is trained on "
                f"({error.strerror}); set TMPDIR to another folder or lower "
                "codec_training.max_documents"
            ) from error
        return ImageRef(image.name, partial(_read_stored, self._file, begin, len(data)))


def _read_stored(file: IO[bytes], begin: int, size: int) -> Image.Image:
    image: Image.Image = pickle.loads(os.pread(file.fileno(), size, begin))()
    return image


class ReadableImages(Sequence[Tensor]):
    """Images preprocessed for the codec, each read when it is accessed: float [3, H, W].

    An image that cannot be read, or is dropped, is replaced by the next one that is not.

    Attributes:
        unreadable: reason for each index that could not be read so far.
    """

    def __init__(self, images: Sequence[ImageRef], size: int, max_unreadable: float = 0.01):
        """Read nothing yet.

        Args:
            size: side of a preprocessed image in pixels.
            max_unreadable: maximum fraction of them that may be unreadable.
        """
        self.images, self.size, self.max_unreadable = images, size, max_unreadable
        self.unreadable: dict[int, str] = {}
        # The index to try instead of each one that is unreadable or dropped.
        self._replacements: dict[int, int] = {}

    @property
    def has_readable(self) -> bool:
        """Whether at least one image can be read."""
        try:
            return self[0] is not None
        except StorageError:
            raise
        except (IndexError, UserError):
            return False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """Return the image at an integer index.

        Raises:
            UserError: all images, or more than `max_unreadable`, cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        skipped: list[int] = []
        while True:
            self._check_unreadable()
            while index in self._replacements:
                skipped.append(index)
                index = self._replacements[index]
            try:
                pixels_3HW = preprocess(self.images[index].read(), self.size)
            except StorageError:
                raise
            except UserError as error:
                if not isinstance(error, DroppedImageError):
                    self.unreadable[index] = shorten(str(error))
                self._replacements[index] = (index + 1) % len(self)
                continue
            # The next access does not walk through a long run of unreadable images again.
            self._replacements.update(dict.fromkeys(skipped, index))
            return pixels_3HW

    def _check_unreadable(self) -> None:
        count = len(self.unreadable)
        if count < len(self._replacements) == len(self):
            raise UserError(f"all {len(self)} images are dropped by 'clean', or cannot be read")
        if count and (count > self.max_unreadable * len(self) or count == len(self)):
            limit = f", more than data.max_rejected = {self.max_unreadable:g} allows"
            raise UserError(
                f"{count} of {len(self)} images cannot be read"
                f"{limit if count < len(self) else ''}; the last: {[*self.unreadable.values()][-1]}"
            )
