"""Whether documents can meet the picture budget: asked before training starts, told in numbers.

What a micro-batch holds follows from the documents alone: with T text tokens beside each picture
on average, k pictures of c codes and their two boundaries bring k · (T + c + 2) tokens. More than
the batch's positions would pile up without end; fewer leave padding, unless documents without
pictures fill the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from moma.errors import UserError

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
    _check_text(demand, _text_of_each(pictured, demand.codes + 2), has_text)


def _text_of_each(pictured: Sequence[Pictured], span: int) -> float:
    """Text tokens beside each picture in the mixture (T), `<s>` and `</s>` included."""
    text = pictures = 0.0
    for each in pictured:
        spread = np.linspace(0, len(each.rows) - 1, min(len(each.rows), _LOOKED_UP))
        rows = each.rows[spread.astype(np.int64)]
        tokens = np.mean([len(each.documents.ids(int(row))) for row in rows])
        of_each = each.documents.pictures[rows].mean()
        text += each.weight * (tokens - of_each * span)
        pictures += each.weight * of_each
    return float(text / pictures)


def _check_text(demand: Demand, text: float, has_text: bool) -> None:
    """Compare the text beside each picture with the room that there is for it."""
    span = demand.codes + 2
    room = demand.size / demand.pictures - span
    # Pictures whose text still finds room.
    most = min(int(demand.size / (text + span)), demand.rows * (demand.row_length // span))
    shape = f"{demand.pictures} pictures in {demand.rows} rows of {demand.row_length}"
    if text > room:
        advice = f"lower picture_share to {demand.share(most)}, " if most else ""
        raise UserError(
            f"documents bring {text:.6g} text tokens with each picture, but {shape} leave room for "
            f"{room:.6g} beside each; {advice}raise row_length or shorten the texts beside pictures"
        )
    padding = 1 - demand.pictures * (text + span) / demand.size
    if not has_text and padding > demand.most_padding:
        least = 1 - most * (text + span) / demand.size
        advice = f"raise picture_share to {demand.share(most)}, which leaves {least:.2%}, "
        raise UserError(
            f"documents bring {text:.6g} text tokens with each picture, {shape} leave room for "
            f"{room:.6g} beside each, and no document without pictures fills the rest: "
            f"{padding:.2%} of the positions would be padding, and data.most_padding allows "
            f"{demand.most_padding:.2%}; add a source of text, "
            f"{advice if most > demand.pictures else ''}choose another row_length, "
            "or raise data.most_padding"
        )
