"""What tokenizers learn from: the texts and pictures of a recipe's sources.

Nothing is held in memory but the places of pictures. Rows and pictures that cannot be read are
left out, counted, and told at the end.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

from torch import Tensor

from moma.data.documents import (
    Document,
    Picture,
    Rejected,
    Source,
    held_out_share,
    is_held_out,
)
from moma.errors import UserError
from moma.tokenizers.image import preprocess

_UNREADABLE_SHARE = 0.01


class Corpus:
    """The documents of some sources.

    Attributes:
        documents: how many documents were read.
        rejected: how many rows could not be documents.
        first_rejected: the first of them.
    """

    def __init__(self, sources: Sequence[Source], held_out: float, most: int):
        """Read from the start of each source.

        Args:
            sources: where documents come from.
            held_out: share kept from training, where a source has none of its own.
            most: documents of each source, from the first on.
        """
        self._sources, self._held_out, self._most = sources, held_out, most
        self.documents = self.rejected = 0
        self.first_rejected: Rejected | None = None

    def texts(self) -> Iterator[str]:
        """The texts of the documents that are for training."""
        for document in self._chosen(held_out=False):
            yield from (segment for segment in document.segments if isinstance(segment, str))

    def pictures(self, held_out: bool) -> list[Picture]:
        """The pictures of the documents that are for training, or of those held out."""
        return [
            segment
            for document in self._chosen(held_out)
            for segment in document.segments
            if isinstance(segment, Picture)
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
        for row in source.documents():
            if isinstance(row, Document):
                yield row
                continue
            self.rejected += 1
            self.first_rejected = self.first_rejected or row


class ReadablePictures(Sequence[Tensor]):
    """Pictures as the codec takes them, each read when it is asked for: float [3, H, W].

    In the place of a picture that cannot be read stands the next one that can.

    Attributes:
        unreadable: reason of each index that could not be read so far.
    """

    def __init__(self, pictures: Sequence[Picture], size: int):
        self.pictures, self.size = pictures, size
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """The picture at `index`, an integer.

        Raises:
            UserError: more than 1% of the pictures cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        while True:
            if index not in self.unreadable:
                try:
                    return preprocess(self.pictures[index].read(), self.size)
                except UserError as error:
                    self._set_aside(index, error)
            index = (index + 1) % len(self)

    def _set_aside(self, index: int, error: UserError) -> None:
        self.unreadable[index] = str(error)
        if len(self.unreadable) > _UNREADABLE_SHARE * len(self):
            raise UserError(
                f"{len(self.unreadable)} of {len(self)} pictures cannot be read, more than "
                f"{_UNREADABLE_SHARE:.0%}; the last: {error}"
            ) from error
