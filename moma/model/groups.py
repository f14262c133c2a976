"""The expert groups of a model: configuration, names of architectures, shares of the tokens."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from pydantic import Field, field_validator

from moma.errors import UserError
from moma.recipe import Config
from moma.vocabulary import MODALITIES

MAX_EXPERTS = 2**16
"""Most experts of a group."""


class GroupConfig(Config):
    """A group of experts.

    Attributes:
        modalities: names of the modalities whose tokens the group processes.
        experts: number of experts; a group of one has no router.
    """

    modalities: tuple[str, ...] = Field(min_length=1)
    experts: int = Field(ge=1, le=MAX_EXPERTS)

    @field_validator("modalities")
    @classmethod
    def _unique(cls, modalities: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"{', '.join(modalities)}: name each modality once")
        return modalities

    def is_dense(self, modalities: Sequence[str] = MODALITIES) -> bool:
        """Whether it is one expert for all modalities: an ordinary feed-forward."""
        return self.experts == 1 and set(self.modalities) == set(modalities)


class TokenChoiceConfig(Config):
    """Routing by token choice: each token takes the experts of its group with its highest scores.

    A decision depends on one token only, so such a model is causal by construction. Without null
    experts, scores are sigmoids, as in loss-free balancing (arXiv 2408.15664), and weight the
    outputs. With null experts, whose output is zero, they are a softmax over real and null experts,
    and the weights of a token's real experts are normalized to add up to 1 (arXiv 2601.15370).

    Attributes:
        top_k: number k of experts that a token takes, null experts included.
        data_sparsity: fraction ρ of the experts that are real (so named in arXiv 2601.15370): a
            group of E experts has E · (1 − ρ) / ρ null experts, which share one row of the router.
            In balance, a token takes k · ρ real experts: with `top_k` = 1 / ρ, FLOPs equal those of
            a dense model. 1: no null experts.
        capacity_factor: slots of the experts in training, as a multiple of those that a balanced
            load fills; an expert drops the tokens with its lowest scores beyond them. Inference
            drops none.
        bias_rate: loss-free balancing: after a step, the selection bias of an expert whose load
            (number of tokens that took it) is below the mean rises by this, and that of one above
            it falls; 0: no bias.
        balance_loss: weight of the load balancing loss, Q · Σ f · P over the Q real and null
            experts of a group, f their fractions of the selections and P their mean normalized
            scores (arXiv 2101.03961 §2.2); added up over groups and layers.
    """

    top_k: int = Field(1, ge=1)
    data_sparsity: float = Field(1.0, gt=0, le=1)
    capacity_factor: float = Field(1.25, gt=0)
    bias_rate: float = Field(0.001, ge=0)
    balance_loss: float = Field(0.0, ge=0)

    def null_experts(self, experts: int) -> int:
        """Number of null experts of a group with a number of real ones."""
        if self.data_sparsity == 1:
            return 0
        return max(1, round(experts * (1 - self.data_sparsity) / self.data_sparsity))

    def router_outputs(self, experts: int) -> int:
        """Number of rows of the router: one for each real expert, and one for all null experts."""
        return experts + (self.data_sparsity < 1)

    def experts_per_token(self, experts: int) -> float:
        """Mean number of real experts that a token takes, in balance."""
        return self.top_k * experts / (experts + self.null_experts(experts))


def named_groups(name: str) -> tuple[GroupConfig, ...]:
    """Return the groups of an architecture by its name, such as the paper's `moe_4t4i`.

    `dense` is one expert for both modalities, `moe_Nx` N experts for both, and `moe_MtNi` M text
    and N image experts. `token_…` and `null_…` have the same groups; see `named_token_choice`.

    `mod`, alone or as a prefix (`mod_moe_4t4i`), adds mixture-of-depths (`depth.py`) and does not
    change the groups.

    Raises:
        UserError: unknown name.
    """
    if name in ("dense", "mod"):
        return (GroupConfig(modalities=MODALITIES, experts=1),)
    experts = name.removeprefix("mod_")
    if match := re.fullmatch(r"(?:moe|token|null)_(0|[1-9]\d*)x", experts):
        return (GroupConfig(modalities=MODALITIES, experts=_count(match[1], name)),)
    if match := re.fullmatch(r"(?:moe|token|null)_(0|[1-9]\d*)t(0|[1-9]\d*)i", experts):
        counts = [_count(digits, name) for digits in match.groups()]
        return tuple(
            GroupConfig(modalities=(key,), experts=n)
            for key, n in zip(MODALITIES, counts, strict=True)
        )
    raise UserError(
        f"'{name}': no such architecture; write dense, moe_8x, moe_4t4i (any counts), "
        "token_4t4i, null_4t4i, mod, mod_moe_4t4i, or a list of groups such as "
        "[{modalities = ['text'], experts = 4}, …]"
    )


def _count(digits: str, name: str) -> int:
    """The number of experts of a group in the name of an architecture."""
    # Python converts at most 4,300 digits.
    count = int(digits) if len(digits) < 10 else MAX_EXPERTS + 1
    if not 1 <= count <= MAX_EXPERTS:
        raise UserError(f"'{name}': a group needs from 1 to {MAX_EXPERTS:,} experts")
    return count


def named_token_choice(name: str) -> TokenChoiceConfig | None:
    """Return the token choice of an architecture by its name; None for expert choice.

    `token_…` takes one expert and is balanced by biases; `null_…` takes two of as many null as real
    experts and is balanced by a loss, as in arXiv 2601.15370.
    """
    kind = name.removeprefix("mod_").split("_")[0]
    null = TokenChoiceConfig(top_k=2, data_sparsity=0.5, bias_rate=0, balance_loss=0.02)
    return {"token": TokenChoiceConfig(), "null": null}.get(kind)


def group_share(
    group: GroupConfig, shares: Sequence[float], modalities: Sequence[str] = MODALITIES
) -> float:
    """Return the fraction of the tokens that have one of the group's modalities.

    Args:
        shares: fraction of each modality among the tokens.
        modalities: names of the modalities, in the order of `shares`.

    Raises:
        UserError: the group names a modality that is not among `modalities`.
    """
    unknown = [name for name in group.modalities if name not in modalities]
    if unknown:
        known = ", ".join(modalities)
        raise UserError(f"groups: unknown modality '{unknown[0]}'; the modalities are {known}")
    return sum(shares[modalities.index(name)] for name in group.modalities)


def group_capacity_share(
    group: GroupConfig,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
    token_fraction: float = 1.0,
    token_choice: TokenChoiceConfig | None = None,
) -> float:
    """Return K · E / N: a group's slots under static capacity per token that reaches the layer.

        expert choice   the group's share of the tokens
        token choice    min(E, share · capacity_factor · experts per token)
        one expert      min(1, share / token_fraction): all its tokens fit, even if
                        mixture-of-depths selects no others

    Args:
        shares, modalities: as for `group_share`.
        token_fraction: fraction of the tokens of `shares` that reach the layer; below 1 with
            mixture-of-depths whose modalities compete.
        token_choice: token choice; None: expert choice.

    Raises:
        UserError: the group names a modality that is not among `modalities`.
    """
    share = group_share(group, shares, modalities)
    if group.experts == 1:
        return min(1.0, share / token_fraction)
    if token_choice is None:
        return share
    per_token = token_choice.capacity_factor * token_choice.experts_per_token(group.experts)
    return min(float(group.experts), share * per_token)


def max_groups_per_modality(modalities: Iterable[Iterable[int | str]]) -> int:
    """Return the largest number of groups that share a modality, given each group's modalities."""
    return max(Counter(chain.from_iterable(modalities)).values(), default=0)
