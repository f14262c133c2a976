"""What tokenizers learn from: the texts and images of a recipe's sources.

Nothing is held in memory but the places of images. Streams and compressed tars have no places:
their images wait, as they are stored, in a temporary file that ends with the process. Rows and
images that cannot be read are left out and counted.
"""

import os
import pickle
import tempfile
from collections.abc import Iterator, Sequence
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
from moma.data.encode.chunks import refusal
from moma.errors import UserError
from moma.tokenizers.image.codec import preprocess

# What tells where an image lies is smaller; one that carries its bytes is larger, or small anyway.
_MOST_BYTES_HELD = 2048
# A source may be wrong throughout: so many of its rows are named.
_MOST_NAMED = 1_000


class Corpus:
    """The documents of some sources.

    Attributes:
        documents: how many documents were read.
        rejected_rows: the rows that could not be documents, or the first of them, if many.
        rows: how many rows each source has, by its name, if it was read to its end.
    """

    def __init__(
        self, sources: Sequence[Source], held_out: float, most: int, with_images: bool = False
    ):
        """Read from the start of each source.

        Args:
            sources: where documents come from.
            held_out: share kept from training, where a source has none of its own.
            most: documents of each source, from the first on.
            with_images: whether rows whose images are not there count as rejected; they stay
                among the documents, as texts and as places of images.
        """
        self._sources, self._held_out, self._most = sources, held_out, most
        self._with_images = with_images
        self.documents = 0
        self._read: dict[str, int] = {}
        self._rejected: dict[str, int] = {}
        self.rejected_rows: list[Rejected] = []
        self.rows: dict[str, int] = {}

    @property
    def rejected(self) -> int:
        """How many of the rows that were read could not be documents."""
        return sum(self._rejected.values())

    @property
    def first_rejected(self) -> Rejected | None:
        """The first row that could not be a document."""
        return next(iter(self.rejected_rows), None)

    @property
    def read(self) -> int:
        """How many rows were read."""
        return sum(self._read.values())

    def check(self, most_rejected: float) -> None:
        """Refuse what was read.

        Args:
            most_rejected: share of a source's rows that may be rejected.

        Raises:
            UserError: there was no document, or too many rows of a source could not be one.
        """
        if not self.documents:
            raise UserError(f"there is no document to learn from{self._told}; check the sources")
        self.check_rejected(most_rejected)

    def check_rejected(self, most_rejected: float, others: str = "") -> None:
        """Refuse sources of which too many rows were rejected.

        Args:
            most_rejected: share of a source's rows that may be rejected.
            others: where the message sends for rows beside the first.

        Raises:
            UserError: there is such a source.
        """
        for name, rejected in self._rejected.items():
            if rejected > most_rejected * self._read[name]:
                raise UserError(
                    f"source '{name}': {rejected} of {self._read[name]} rows were rejected, more "
                    f"than data.max_rejected = {most_rejected:g} allows{self._told}{others}; or "
                    "raise data.max_rejected"
                )

    @property
    def _told(self) -> str:
        return f"; the first: {self.first_rejected.told}" if self.first_rejected else ""

    def texts(self) -> Iterator[str]:
        """The texts of the documents that are for training."""
        for document in self._chosen(held_out=False):
            yield from (segment for segment in document.segments if isinstance(segment, str))

    def images(self, held_out: bool) -> list[ImageRef]:
        """The images of the documents that are for training, or of those held out."""
        waiting = _WaitingImages()
        return [
            waiting.put_aside(segment)
            for document in self._chosen(held_out)
            for segment in document.segments
            if isinstance(segment, ImageRef)
        ]

    def _chosen(self, held_out: bool) -> Iterator[Document]:
        for source in self._sources:
            share = held_out_share(source, self._held_out)
            documents = (
                document
                for document in self._readable(source)
                if is_held_out(document, share) == held_out
            )
            for document in islice(documents, self._most):
                self.documents += 1
                yield document

    def _readable(self, source: Source) -> Iterator[Document]:
        """The documents of a source that tokenizer and codec can hold."""
        number = rejected = 0
        for number, row in enumerate(source.documents(), 1):
            self._read[source.name] = max(number, self._read.get(source.name, 0))
            if isinstance(row, Document):
                refused = refusal(row)
                if refused is None:
                    yield row
                reason = refused or (_missing_image(row) if self._with_images else None)
                if reason is None:
                    continue
                row = Rejected(row.row or row.name, reason)
            rejected += 1
            if rejected > self._rejected.get(source.name, 0):  # not read before
                self._rejected[source.name] = rejected
                self.rejected_rows += [row][: _MOST_NAMED - len(self.rejected_rows)]
        self.rows[source.name] = number


def _missing_image(document: Document) -> str | None:
    """Why a document cannot be used, as far as that is known without reading its images."""
    images = (part for part in document.segments if isinstance(part, ImageRef))
    return next((told for image in images if (told := image.missing())), None)


class _WaitingImages:
    """Images that carry what they are stored as, on the disk instead of in memory.

    The file has no name, so that nobody else writes what is unpickled here.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None

    def put_aside(self, image: ImageRef) -> ImageRef:
        """The same image, without its bytes."""
        try:
            data = pickle.dumps(image.read)
        except (pickle.PicklingError, AttributeError, TypeError):  # it is made, not stored
            return image
        if len(data) <= _MOST_BYTES_HELD:
            return image
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
        begin = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{tempfile.gettempdir()}: cannot keep the images that the codec is trained on "
                f"({error.strerror}); set TMPDIR to another folder or lower "
                "codec_training.max_documents"
            ) from error
        return ImageRef(image.name, partial(_read_again, self._file, begin, len(data)))


def _read_again(file: IO[bytes], begin: int, size: int) -> Image.Image:
    read = pickle.loads(os.pread(file.fileno(), size, begin))
    image: Image.Image = read()
    return image


class ReadableImages(Sequence[Tensor]):
    """Images as the codec takes them, each read when it is asked for: float [3, H, W].

    In the place of an image that cannot be read stands the next one that can.

    Attributes:
        unreadable: reason of each index that could not be read so far.
    """

    def __init__(self, images: Sequence[ImageRef], size: int, most_unreadable: float = 0.01):
        """Read nothing yet.

        Args:
            images: where they are.
            size: side of an image in pixels.
            most_unreadable: share of them that may be unreadable.
        """
        self.images, self.size, self.most_unreadable = images, size, most_unreadable
        self.unreadable: dict[int, str] = {}

    @property
    def has_readable(self) -> bool:
        """Whether there is an image that can be read."""
        try:
            return self[0] is not None
        except (IndexError, UserError):
            return False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """The image at `index`, an integer.

        Raises:
            UserError: all of the images, or more than `most_unreadable`, cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        while True:
            if index not in self.unreadable:
                try:
                    return preprocess(self.images[index].read(), self.size)
                except UserError as error:
                    self._set_aside(index, error)
            index = (index + 1) % len(self)

    def _set_aside(self, index: int, error: UserError) -> None:
        self.unreadable[index] = str(error)
        found, most = len(self.unreadable), self.most_unreadable * len(self)
        if found > most or found == len(self):
            raise UserError(
                f"{found} of {len(self)} images cannot be read, and {self.most_unreadable:.0%} "
                f"may be; the last: {error}"
            ) from error
