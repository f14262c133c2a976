"""Whether documents can meet the image budget: asked before training starts, told in numbers.

What a micro-batch holds follows from the documents alone: with T text tokens beside each image
on average, k images of c codes and their two boundaries bring k · (T + c + 2) tokens. More than
the batch's positions would pile up without end; fewer leave padding, unless documents without
images fill the rest. Without such, the first micro-batches may have more of it than the average
says: what longer documents bring later cannot fill them, nor can what lies in open documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from moma.errors import UserError

# Padding has to hold over so many micro-batches, though chance be so many standard deviations off.
_FIRST_BATCHES = 300
_DEVIATIONS = 3.0
# Documents of a source whose lengths are looked up; all of them if there are no more.
_LOOKED_UP = 4096


class Documents(Protocol):
    """The encoded documents of one split of a source."""

    @property
    def images(self) -> np.ndarray:
        """Images of each document, integers of shape [documents]."""
        ...

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a document, integers of shape [tokens]."""
        ...


class ImageDocuments(NamedTuple):
    """The documents with images of one source.

    Attributes:
        name: the source's.
        weight: how often it is drawn.
        documents: the source's split.
        rows: rows of those with images, integers of shape [documents].
    """

    name: str
    weight: float
    documents: Documents
    rows: np.ndarray


@dataclass(frozen=True)
class Demand:
    """What the recipe asks for.

    Attributes:
        micro_batch_size, sequence_length: shape of a micro-batch.
        images: its images.
        codes: image codes of an image.
        max_padding: largest share of positions that may be padding.
        world_size: ranks that take a micro-batch each in a step.
    """

    micro_batch_size: int
    sequence_length: int
    images: int
    codes: int
    max_padding: float
    world_size: int

    @property
    def size(self) -> int:
        """Positions of a micro-batch (N)."""
        return self.micro_batch_size * self.sequence_length

    def padding(self, images: int, text: float) -> float:
        """Share of positions that so many images, with their text, leave on average."""
        return 1 - images * (text + self.codes + 2) / self.size

    def share(self, images: int) -> str:
        """A number of images as `image_share`, for a message."""
        return f"{images * self.codes / self.size:.6g} ({images} images)"


def check_supply(
    demand: Demand, with_images: Sequence[ImageDocuments], has_text: bool, names: str
) -> None:
    """Refuse a recipe whose documents cannot meet its image budget.

    Args:
        demand: what the recipe asks for.
        with_images: the documents with images, for each source that has some.
        has_text: whether any source has documents without images.
        names: the sources' names, for the message.

    Raises:
        UserError: there are no images or too few, no text, or too much or too little text
            beside each image. The message gives the numbers and what to change.
    """
    if not demand.images:
        if not has_text:
            raise UserError(
                f"image_share is 0, but every document of {names} has an image; "
                "add a source of text or raise image_share"
            )
        return
    if not with_images:
        raise UserError(
            f"image_share is {demand.images * demand.codes / demand.size:g}, but no document "
            f"of {names} has an image; add a source of images or set image_share to 0"
        )
    found = sum(int(each.documents.images[each.rows].sum()) for each in with_images)
    if found < demand.images * demand.world_size:
        raise UserError(
            f"a step takes {demand.images} images for each of its micro-batches, one a rank, "
            f"{demand.images * demand.world_size} in all, but "
            f"the training documents of {names} hold {found} in all, so that a step would show "
            "some twice; add images, or lower image_share or micro_batch_size"
        )
    text = _Text.of(with_images, demand)
    _check_room(demand, text.beside)
    if not has_text:
        _check_padding(demand, text)


class _Lengths(NamedTuple):
    """Documents with images of one source, some of them looked up.

    Attributes:
        weight: how often the source is drawn.
        text, images: text tokens, `<s>` and `</s>` included, and images of each document.
        documents: how many there are in all.
    """

    weight: float
    text: np.ndarray
    images: np.ndarray
    documents: int


@dataclass(frozen=True)
class _Text:
    """What documents bring beside their images, in the mixture.

    Attributes:
        beside: text tokens beside each image (T).
        images: of a document, on average.
        sources: the documents.
    """

    beside: float
    images: float
    sources: tuple[_Lengths, ...]

    @classmethod
    def of(cls, with_images: Sequence[ImageDocuments], demand: Demand) -> "_Text":
        """Look lengths up."""
        sources = tuple(_lengths(each, demand.codes + 2) for each in with_images)
        weights = sum(each.weight for each in sources)
        text = sum(each.weight * each.text.mean() for each in sources)
        images = sum(each.weight * each.images.mean() for each in sources)
        return cls(float(text / images), float(images / weights), sources)

    def padding_at_first(self, demand: Demand, images: int) -> float:
        """Share of positions of the first micro-batches that may be padding beyond the average.

        What `images` bring into n micro-batches is a sum over documents drawn without
        replacement: of m micro-batches an epoch, its variance is n (1 − n / m) times that of one.
        """
        weights = sum(each.weight for each in self.sources)
        variance = 0.0
        for each in self.sources:
            drawn = images / self.images * each.weight / weights  # documents of a micro-batch
            epoch = each.documents / (drawn * demand.world_size)
            most = min(_FIRST_BATCHES, epoch / 2)
            beyond = each.text - self.beside * each.images
            variance += drawn * float(beyond.var()) * most * (1 - most / epoch)
        document = self.images * (self.beside + demand.codes + 2)
        missing = _DEVIATIONS * variance**0.5 + demand.micro_batch_size * document
        return missing / (_FIRST_BATCHES * demand.size)


def _lengths(each: ImageDocuments, span: int) -> _Lengths:
    spread = np.linspace(0, len(each.rows) - 1, min(len(each.rows), _LOOKED_UP))
    rows = each.rows[spread.astype(np.int64)]
    tokens = np.array([len(each.documents.ids(int(row))) for row in rows])
    images = each.documents.images[rows]
    return _Lengths(each.weight, tokens - images * span, images, len(each.rows))


def _most_images(demand: Demand, text: float) -> int:
    """Images whose text still finds room."""
    span = demand.codes + 2
    return min(
        int(demand.size / (text + span)), demand.micro_batch_size * (demand.sequence_length // span)
    )


def _told(demand: Demand, text: float) -> str:
    room = demand.size / demand.images - demand.codes - 2
    return (
        f"documents bring {text:.6g} text tokens with each image, {{but}}{demand.images} "
        f"images in {demand.micro_batch_size} sequences of {demand.sequence_length} leave room "
        f"for {room:.6g} beside "
        "each"
    )


def _check_room(demand: Demand, text: float) -> None:
    """Refuse more text beside each image than there is room for."""
    if demand.padding(demand.images, text) >= 0:
        return
    most = _most_images(demand, text)
    advice = f"lower image_share to {demand.share(most)}, " if most else ""
    raise UserError(
        f"{_told(demand, text).format(but='but ')}; {advice}raise sequence_length or shorten the "
        f"texts "
        "beside images"
    )


def _check_padding(demand: Demand, text: _Text) -> None:
    """Refuse less text beside each image than fills the sequences, where nothing else does."""
    padding = demand.padding(demand.images, text.beside)
    at_first = text.padding_at_first(demand, demand.images)
    if padding + at_first <= demand.max_padding:
        return
    most = _most_images(demand, text.beside)
    least = demand.padding(most, text.beside)
    advice = f"raise image_share to {demand.share(most)}, which leaves {least:.2%}, "
    raise UserError(
        f"{_told(demand, text.beside).format(but='')}, and no document without images fills the "
        f"rest: {padding:.2%} of the positions would be padding, of the first {_FIRST_BATCHES} "
        f"micro-batches up to {at_first:.2%} more, and data.max_padding allows "
        f"{demand.max_padding:.2%}; add a source of text, "
        f"{advice if most > demand.images else ''}choose another sequence_length, "
        "or raise data.max_padding"
    )
