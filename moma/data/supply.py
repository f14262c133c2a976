"""Whether documents can meet the picture budget: asked before training starts, told in numbers.

What a micro-batch holds follows from the documents alone: with T text tokens beside each picture
on average, k pictures of c codes and their two boundaries bring k · (T + c + 2) tokens. More than
the batch's positions would pile up without end; fewer leave padding, unless documents without
pictures fill the rest. Without such, the first micro-batches may have more of it than the average
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
    def pictures(self) -> np.ndarray:
        """Pictures of each document, integers of shape [documents]."""
        ...

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a document, integers of shape [tokens]."""
        ...


class Pictured(NamedTuple):
    """The documents with pictures of one source.

    Attributes:
        name: the source's.
        weight: how often it is drawn.
        documents: the source's split.
        rows: rows of those with pictures, integers of shape [documents].
    """

    name: str
    weight: float
    documents: Documents
    rows: np.ndarray


@dataclass(frozen=True)
class Demand:
    """What the recipe asks for.

    Attributes:
        rows, row_length: shape of a micro-batch.
        pictures: its pictures.
        codes: image codes of a picture.
        most_padding: largest share of positions that may be padding.
        world_size: ranks that take a micro-batch each in a step.
    """

    rows: int
    row_length: int
    pictures: int
    codes: int
    most_padding: float
    world_size: int

    @property
    def size(self) -> int:
        """Positions of a micro-batch (N)."""
        return self.rows * self.row_length

    def padding(self, pictures: int, text: float) -> float:
        """Share of positions that so many pictures, with their text, leave on average."""
        return 1 - pictures * (text + self.codes + 2) / self.size

    def share(self, pictures: int) -> str:
        """A number of pictures as `picture_share`, for a message."""
        return f"{pictures * self.codes / self.size:.6g} ({pictures} pictures)"


def check_supply(demand: Demand, pictured: Sequence[Pictured], has_text: bool, names: str) -> None:
    """Refuse a recipe whose documents cannot meet its picture budget.

    Args:
        demand: what the recipe asks for.
        pictured: the documents with pictures, for each source that has some.
        has_text: whether any source has documents without pictures.
        names: the sources' names, for the message.

    Raises:
        UserError: there are no pictures or too few, no text, or too much or too little text
            beside each picture. The message gives the numbers and what to change.
    """
    if not demand.pictures:
        if not has_text:
            raise UserError(
                f"picture_share is 0, but every document of {names} has a picture; "
                "add a source of text or raise picture_share"
            )
        return
    if not pictured:
        raise UserError(
            f"picture_share is {demand.pictures * demand.codes / demand.size:g}, but no document "
            f"of {names} has a picture; add a source of pictures or set picture_share to 0"
        )
    found = sum(int(each.documents.pictures[each.rows].sum()) for each in pictured)
    if found < demand.pictures * demand.world_size:
        raise UserError(
            f"a step takes {demand.pictures} pictures for each of its micro-batches, one a rank, "
            f"{demand.pictures * demand.world_size} in all, but "
            f"the training documents of {names} hold {found} in all, so that a step would show "
            "some twice; add pictures, or lower picture_share or rows"
        )
    text = _Text.of(pictured, demand)
    _check_room(demand, text.beside)
    if not has_text:
        _check_padding(demand, text)


class _Lengths(NamedTuple):
    """Documents with pictures of one source, some of them looked up.

    Attributes:
        weight: how often the source is drawn.
        text, pictures: text tokens, `<s>` and `</s>` included, and pictures of each document.
        documents: how many there are in all.
    """

    weight: float
    text: np.ndarray
    pictures: np.ndarray
    documents: int


@dataclass(frozen=True)
class _Text:
    """What documents bring beside their pictures, in the mixture.

    Attributes:
        beside: text tokens beside each picture (T).
        pictures: of a document, on average.
        sources: the documents.
    """

    beside: float
    pictures: float
    sources: tuple[_Lengths, ...]

    @classmethod
    def of(cls, pictured: Sequence[Pictured], demand: Demand) -> "_Text":
        """Look lengths up."""
        sources = tuple(_lengths(each, demand.codes + 2) for each in pictured)
        weights = sum(each.weight for each in sources)
        text = sum(each.weight * each.text.mean() for each in sources)
        pictures = sum(each.weight * each.pictures.mean() for each in sources)
        return cls(float(text / pictures), float(pictures / weights), sources)

    def padding_at_first(self, demand: Demand, pictures: int) -> float:
        """Share of positions of the first micro-batches that may be padding beyond the average.

        What `pictures` bring into n micro-batches is a sum over documents drawn without
        replacement: of m micro-batches an epoch, its variance is n (1 − n / m) times that of one.
        """
        weights = sum(each.weight for each in self.sources)
        variance = 0.0
        for each in self.sources:
            drawn = pictures / self.pictures * each.weight / weights  # documents of a micro-batch
            epoch = each.documents / (drawn * demand.world_size)
            most = min(_FIRST_BATCHES, epoch / 2)
            beyond = each.text - self.beside * each.pictures
            variance += drawn * float(beyond.var()) * most * (1 - most / epoch)
        document = self.pictures * (self.beside + demand.codes + 2)
        missing = _DEVIATIONS * variance**0.5 + demand.rows * document
        return missing / (_FIRST_BATCHES * demand.size)


def _lengths(each: Pictured, span: int) -> _Lengths:
    spread = np.linspace(0, len(each.rows) - 1, min(len(each.rows), _LOOKED_UP))
    rows = each.rows[spread.astype(np.int64)]
    tokens = np.array([len(each.documents.ids(int(row))) for row in rows])
    pictures = each.documents.pictures[rows]
    return _Lengths(each.weight, tokens - pictures * span, pictures, len(each.rows))


def _most_pictures(demand: Demand, text: float) -> int:
    """Pictures whose text still finds room."""
    span = demand.codes + 2
    return min(int(demand.size / (text + span)), demand.rows * (demand.row_length // span))


def _told(demand: Demand, text: float) -> str:
    room = demand.size / demand.pictures - demand.codes - 2
    return (
        f"documents bring {text:.6g} text tokens with each picture, {{but}}{demand.pictures} "
        f"pictures in {demand.rows} rows of {demand.row_length} leave room for {room:.6g} beside "
        "each"
    )


def _check_room(demand: Demand, text: float) -> None:
    """Refuse more text beside each picture than there is room for."""
    if demand.padding(demand.pictures, text) >= 0:
        return
    most = _most_pictures(demand, text)
    advice = f"lower picture_share to {demand.share(most)}, " if most else ""
    raise UserError(
        f"{_told(demand, text).format(but='but ')}; {advice}raise row_length or shorten the texts "
        "beside pictures"
    )


def _check_padding(demand: Demand, text: _Text) -> None:
    """Refuse less text beside each picture than fills the rows, where nothing else does."""
    padding = demand.padding(demand.pictures, text.beside)
    at_first = text.padding_at_first(demand, demand.pictures)
    if padding + at_first <= demand.most_padding:
        return
    most = _most_pictures(demand, text.beside)
    least = demand.padding(most, text.beside)
    advice = f"raise picture_share to {demand.share(most)}, which leaves {least:.2%}, "
    raise UserError(
        f"{_told(demand, text.beside).format(but='')}, and no document without pictures fills the "
        f"rest: {padding:.2%} of the positions would be padding, of the first {_FIRST_BATCHES} "
        f"micro-batches up to {at_first:.2%} more, and data.most_padding allows "
        f"{demand.most_padding:.2%}; add a source of text, "
        f"{advice if most > demand.pictures else ''}choose another row_length, "
        "or raise data.most_padding"
    )
