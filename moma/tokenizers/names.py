"""How special ids and image codes are spelled in a tokenizer file: our way and Chameleon's."""

import re
from dataclasses import dataclass

from moma.errors import UserError
from moma.vocabulary import Vocabulary

_CHAMELEON_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


@dataclass(frozen=True)
class Names:
    """Names of the ids that are no text.

    Attributes:
        beginning, end, padding, begin_image, end_image: as in `Vocabulary`.
        code: matches the name of an image code; its group holds the decimal number.
        digits: turns the letters in that group into digits.
    """

    beginning: str
    end: str
    padding: str
    begin_image: str
    end_image: str
    code: re.Pattern[str]
    digits: dict[int, int]

    @property
    def special(self) -> tuple[str, ...]:
        """Names of the five special ids."""
        return (self.beginning, self.end, self.padding, self.begin_image, self.end_image)

    def codes(self, ids: dict[str, int]) -> list[int]:
        """Ids of the image codes, in the codebook's order.

        Raises:
            UserError: a code is missing, or two names mean the same one.
        """
        found = sorted(
            (int(match[1].translate(self.digits)), id_)
            for name, id_ in ids.items()
            if (match := self.code.fullmatch(name))
        )
        for expected, (code, _) in enumerate(found):
            if code != expected:
                raise UserError(f"the tokenizer's image codes are not 0 … n: look at code {code}")
        return [id_ for _, id_ in found]


OURS = Names(
    beginning="<s>",
    end="</s>",
    padding="<pad>",
    begin_image="<image>",
    end_image="</image>",
    code=re.compile(r"<code:(\d+)>"),
    digits={},
)
# A code is spelled IMGIMG, its decimal digits as letters, Z: 205 is IMGIMGCAFZ.
CHAMELEON = Names(
    beginning="<s>",
    end="</s>",
    padding="<pad>",
    begin_image="<racm3:break>",
    end_image="<eoss>",
    code=re.compile(r"IMGIMG([A-J]+)Z"),
    digits=_CHAMELEON_DIGITS,
)


def names_in(ids: dict[str, int]) -> Names:
    """Which way a tokenizer file is spelled, told by the names of its image codes."""
    return CHAMELEON if any(map(CHAMELEON.code.fullmatch, ids)) else OURS


def read_vocabulary(ids: dict[str, int], codes_per_image: int) -> Vocabulary:
    """The vocabulary by the names in a tokenizer file; ids may stand in any order, with gaps.

    Args:
        ids: id of each name.
        codes_per_image: how many codes one image takes.

    Raises:
        UserError: a special id or an image code is missing.
    """
    names = names_in(ids)
    missing = [name for name in names.special if name not in ids]
    if missing:
        raise UserError(f"the tokenizer has no id for {', '.join(missing)}; it is not mixed-modal")
    return Vocabulary(
        size=max(ids.values()) + 1,
        beginning=ids[names.beginning],
        end=ids[names.end],
        padding=ids[names.padding],
        begin_image=ids[names.begin_image],
        end_image=ids[names.end_image],
        image_codes=tuple(names.codes(ids)),
        codes_per_image=codes_per_image,
    )
