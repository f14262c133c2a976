"""Names of special ids and image codes in tokenizer files: those of moma and Chameleon's."""

import re
from dataclasses import dataclass
from typing import Any

from moma.errors import UserError
from moma.vocabulary import Vocabulary


@dataclass(frozen=True)
class Names:
    """Names of the ids that are not text.

    Attributes:
        special: names of `Vocabulary.special`.
        code: matches the name of an image code; its group is the code's number.
        digits: letters in that group → digits.
    """

    special: tuple[str, str, str, str, str]
    code: re.Pattern[str]
    digits: dict[int, int]

    def codes(self, ids: dict[str, int]) -> list[int]:
        """Ids of the image codes, in codebook order.

        Raises:
            UserError: a code is missing, or has two names.
        """
        found = sorted(
            (int(match[1].translate(self.digits)), id_)
            for name, id_ in ids.items()
            if (match := self.code.fullmatch(name))
        )
        for expected, (code, _) in enumerate(found):
            if code != expected:
                raise UserError(
                    f"the tokenizer's image codes are not numbered 0, 1, …: look at code {code}"
                )
        return [id_ for _, id_ in found]


OURS = Names(
    special=("<s>", "</s>", "<pad>", "<image>", "</image>"),
    code=re.compile(r"<code:([0-9]{1,9})>"),
    digits={},
)
CHAMELEON = Names(
    special=("<s>", "</s>", "<pad>", "<racm3:break>", "<eoss>"),
    code=re.compile(r"IMGIMG([A-J]{1,9})Z"),  # code 205 is IMGIMGCAFZ
    digits=str.maketrans("ABCDEFGHIJ", "0123456789"),
)


def names_in(ids: dict[str, int]) -> Names:
    """Which names a tokenizer file uses, decided by those of its image codes."""
    return CHAMELEON if any(map(CHAMELEON.code.fullmatch, ids)) else OURS


def read_vocabulary(ids: dict[str, int], codes_per_image: int) -> Vocabulary:
    """The vocabulary by the names in a tokenizer file; ids may have any order, and gaps.

    Args:
        codes_per_image: number of codes of an image.

    Raises:
        UserError: a special id or an image code is missing, or an id is not possible.
    """
    names = names_in(ids)
    missing = [name for name in names.special if name not in ids]
    if missing:
        raise UserError(f"the tokenizer has no id for {', '.join(missing)}; it is not mixed-modal")
    special, codes = [ids[name] for name in names.special], tuple(names.codes(ids))
    values: list[Any] = [max(ids.values()) + 1, *special, codes, codes_per_image]
    try:
        return Vocabulary(*values)
    except ValueError as error:
        raise UserError(f"the tokenizer's ids make no vocabulary: {error}") from error
