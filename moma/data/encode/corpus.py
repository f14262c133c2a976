"""The documents that tokenizers are trained on: texts and images of a recipe's sources.

Only references to images are held in memory. Images of streams and compressed tar files carry
their bytes; these wait in a temporary file that ends with the process. Documents and images that
cannot be read are left out and counted.
"""

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import IO

from PIL import Image
from torch import Tensor

from moma.data.documents import (
    Document,
    ImageRef,
    Rejected,
    Source,
    held_out_share,
    is_held_out,
)
from moma.data.encode.chunks import CHUNK_DOCUMENTS, find_problem
from moma.errors import UserError
from moma.tokenizers.image.codec import preprocess

# A reference to a file is smaller; a larger one carries the image's bytes.
_MAX_REFERENCE_BYTES = 2048
# A source may be wrong throughout: the first rejected documents are kept.
_MAX_REJECTED_KEPT = 1_000


class Corpus:
    """The documents of some sources, read in order; too many rejected ones are an error.

    Attributes:
        documents: number of documents that were used.
        other_documents: number of documents that were read and belong to the other split.
        rejected: rejected documents of each source, by its name; the first ones, if many.
        totals: documents of each source, rejected ones included, if it was read to its end.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        held_out: float,
        max_documents: int,
        max_rejected: float = 1.0,
        check_images: bool = False,
        list_rejected: Callable[[str, list[Rejected]], str] = lambda source, rejected: "",
    ):
        """Set up reading; nothing is read yet.

        Args:
            sources: where documents come from.
            held_out: fraction held out, for sources that do not set their own.
            max_documents: maximum documents of each source, from the first on.
            max_rejected: maximum fraction of a source's documents that may be rejected.
            check_images: whether documents with missing image files count as rejected; they are
                used nevertheless, since the file may exist when it is read.
            list_rejected: called with a source's name and rejected documents if there are too
                many; writes them somewhere and returns where, for the message.
        """
        self._sources, self._held_out, self._max_documents = sources, held_out, max_documents
        self._max_rejected, self._check_images = max_rejected, check_images
        self._list_rejected = list_rejected
        self._read: dict[str, int] = {}
        self._rejected_counts: dict[str, int] = {}
        self.documents = self.other_documents = 0
        self.rejected: dict[str, list[Rejected]] = {}
        self.totals: dict[str, int] = {}

    @property
    def rejected_count(self) -> int:
        """Number of documents that were read and rejected."""
        return sum(self._rejected_counts.values())

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
            raise UserError(
                f"all {self.other_documents:,} documents are held out, so nothing is left for "
                "training; lower data.held_out, or the held_out of a source"
            )
        first = f"; the first: {self.first_rejected.message}" if self.first_rejected else ""
        raise UserError(f"there is no document to train on{first}; check the sources")

    def texts(self) -> Iterator[str]:
        """Yield the texts of the training documents.

        Raises:
            UserError: too many documents of a source were rejected.
        """
        for document in self._select(held_out=False):
            yield from (segment for segment in document.segments if isinstance(segment, str))

    def images(self, held_out: bool) -> list[ImageRef]:
        """Return the images of the training documents or of the held-out ones.

        Raises:
            UserError: too many documents of a source were rejected.
        """
        waiting = _ImageStore()
        return [
            waiting.store(segment)
            for document in self._select(held_out)
            for segment in document.segments
            if isinstance(segment, ImageRef)
        ]

    def _select(self, held_out: bool) -> Iterator[Document]:
        for source in self._sources:
            share = held_out_share(source, self._held_out)
            selected = (
                document
                for document in self._usable(source)
                if self._belongs(is_held_out(document, share) == held_out)
            )
            for document in islice(selected, self._max_documents):
                self.documents += 1
                yield document
            # A few rejected documents among the first ones need not be too many of all.
            if source.name in self.totals or self._read.get(source.name, 0) >= CHUNK_DOCUMENTS:
                self._check_rejected(source.name)

    def _belongs(self, selected: bool) -> bool:
        self.other_documents += not selected
        return selected

    def _usable(self, source: Source) -> Iterator[Document]:
        """Yield the documents of a source that tokenizer and codec can encode."""
        number = rejected = 0
        for number, row in enumerate(source.documents(), 1):
            self._read[source.name] = max(number, self._read.get(source.name, 0))
            if isinstance(row, Document):
                problem = find_problem(row)
                if problem is None:
                    yield row
                reason = problem or (_missing_image(row) if self._check_images else None)
                if reason is None:
                    continue
                row = Rejected(row.row or row.name, reason)
            rejected += 1
            if rejected > self._rejected_counts.get(source.name, 0):  # not counted before
                self._rejected_counts[source.name] = rejected
                if rejected <= _MAX_REJECTED_KEPT:
                    self.rejected.setdefault(source.name, []).append(row)
        self.totals[source.name] = number

    def _check_rejected(self, name: str) -> None:
        count, read = self._rejected_counts.get(name, 0), self._read.get(name, 0)
        if count <= self._max_rejected * read:
            return
        rows = self.rejected[name]
        place = self._list_rejected(name, rows)
        which = "all" if len(rows) == count else f"the first {len(rows):,}"
        listed = f" ({place} lists {which})" if place else ""
        raise UserError(
            f"source '{name}': {count} of {read} documents were rejected, more than "
            f"data.max_rejected = {self._max_rejected:g} allows; the first: "
            f"{rows[0].message}{listed}; or raise data.max_rejected"
        )


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
    if training:
        return
    if held_out:
        raise UserError(
            f"all {len(held_out):,} images are in held-out documents, so nothing is left to train "
            "the codec on; lower data.held_out, or the held_out of a source"
        )
    raise UserError(
        f"the sources have no images, so there is nothing to train a codec on; {remedy}"
    )


def _missing_image(document: Document) -> str | None:
    """Return why a document cannot be used, as far as that is known without reading images."""
    images = (part for part in document.segments if isinstance(part, ImageRef))
    return next((reason for image in images if (reason := image.missing())), None)


class _ImageStore:
    """Keeps images that carry their bytes on disk instead of in memory.

    The file has no name, so that nobody else can write what is unpickled here.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def store(self, image: ImageRef) -> ImageRef:
        """Return the same image without its bytes in memory."""
        try:
            data = pickle.dumps(image.read)
        except (pickle.PicklingError, AttributeError, TypeError):  # computed rather than stored
            return image
        if len(data) <= _MAX_REFERENCE_BYTES:
            return image
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
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
    read = pickle.loads(os.pread(file.fileno(), size, begin))
    image: Image.Image = read()
    return image


class ReadableImages(Sequence[Tensor]):
    """Images preprocessed for the codec, each read when it is accessed: float [3, H, W].

    An image that cannot be read is replaced by the next one that can.

    Attributes:
        unreadable: reason for each index that could not be read so far.
    """

    def __init__(self, images: Sequence[ImageRef], size: int, max_unreadable: float = 0.01):
        """Read nothing yet.

        Args:
            images: the images.
            size: side of a preprocessed image in pixels.
            max_unreadable: maximum fraction of them that may be unreadable.
        """
        self.images, self.size, self.max_unreadable = images, size, max_unreadable
        self.unreadable: dict[int, str] = {}

    @property
    def has_readable(self) -> bool:
        """Whether at least one image can be read."""
        try:
            return self[0] is not None
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
        while True:
            if index not in self.unreadable:
                try:
                    return preprocess(self.images[index].read(), self.size)
                except UserError as error:
                    self._add_unreadable(index, error)
            index = (index + 1) % len(self)

    def _add_unreadable(self, index: int, error: UserError) -> None:
        self.unreadable[index] = str(error)
        count, limit = len(self.unreadable), self.max_unreadable * len(self)
        if count > limit or count == len(self):
            raise UserError(
                f"{count} of {len(self)} images cannot be read, at most "
                f"{self.max_unreadable:.0%} may be unreadable; the last: {error}"
            ) from error
