"""The expert groups of a model: configuration, names of architectures, shares of the tokens."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from pydantic import Field, field_validator

from moma.errors import UserError
from moma.recipe import Config
from moma.vocabulary import MODALITIES


class GroupConfig(Config):
    """A group of experts.

    Attributes:
        modalities: names of the modalities whose tokens the group processes.
        experts: number of experts; a group of one has no router.
    """

    modalities: tuple[str, ...] = Field(min_length=1)
    experts: int = Field(ge=1)

    @field_validator("modalities")
    @classmethod
    def _unique(cls, modalities: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"{', '.join(modalities)}: name each modality once")
        return modalities


def named_groups(name: str) -> tuple[GroupConfig, ...]:
    """Return the groups of an architecture by the paper's name, such as `moe_4t4i`.

    `mod`, alone or as a prefix (`mod_moe_4t4i`), adds mixture-of-depths (`depth.py`) and does not
    change the groups.

    Raises:
        UserError: unknown name.
    """
    if name in ("dense", "mod"):
        return (GroupConfig(modalities=MODALITIES, experts=1),)
    experts = name.removeprefix("mod_")
    if match := re.fullmatch(r"moe_([1-9]\d*)x", experts):
        return (GroupConfig(modalities=MODALITIES, experts=int(match[1])),)
    if match := re.fullmatch(r"moe_(\d+)t(\d+)i", experts):
        counts = dict(zip(MODALITIES, map(int, match.groups()), strict=True))
        if 0 in counts.values():
            raise UserError(f"'{name}': every modality needs an expert; write at least 1")
        return tuple(GroupConfig(modalities=(key,), experts=n) for key, n in counts.items())
    raise UserError(
        f"'{name}': no such architecture; write dense, moe_8x, moe_4t4i (any counts), mod, "
        "mod_moe_4t4i, or a list of groups such as [{modalities = ['text'], experts = 4}, …]"
    )


def group_share(
    group: GroupConfig,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
    token_fraction: float = 1.0,
) -> float:
    """Return a group's static capacity as a fraction of the tokens that reach the layer.

    With a router it is the share of the group's modalities. Without, all tokens of its modalities
    must fit, even if mixture-of-depths passes on only these: share / token_fraction, at most 1.

    Args:
        group: the group.
        shares: fraction of each modality among all tokens.
        modalities: names of the modalities, in the order of `shares`.
        token_fraction: fraction of all tokens that reach the layer; below 1 with mixture-of-depths.

    Raises:
        UserError: the group names a modality that is not among `modalities`.
    """
    unknown = [name for name in group.modalities if name not in modalities]
    if unknown:
        known = ", ".join(modalities)
        raise UserError(f"groups: unknown modality '{unknown[0]}'; the modalities are {known}")
    share = sum(shares[modalities.index(name)] for name in group.modalities)
    return min(1.0, share / token_fraction) if group.experts == 1 else share


def max_groups_per_modality(modalities: Iterable[Iterable[int | str]]) -> int:
    """Return the largest number of groups that share a modality, given each group's modalities."""
    return max(Counter(chain.from_iterable(modalities)).values(), default=0)
