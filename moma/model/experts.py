"""Mixture of modality-aware experts: the feed-forward of a layer (MoMa §2.2, Equation 1).

    y(x) = Σ_j over the experts that took x  of  s_j(x) · FFN_j(x),   s(x) = sigmoid(x · W_M)

A layer holds one group of experts for each set of modalities; a token meets only the groups of its
own modality (first step, given), and inside a group the experts choose their tokens (second step,
learned). Outputs of groups add, so groups may overlap. Shapes: see `layers.py`.
"""

import math
import re
from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from moma.errors import UserError
from moma.model.auxiliary import AuxiliaryRouter, RouterRecord, RouterReport
from moma.model.layers import SwiGLU, widen
from moma.model.routing import (
    Routing,
    Selection,
    any_unsound,
    choose_by_batch,
    choose_causally,
    router_logits,
    take_all,
)
from moma.recipe import Config
from moma.vocabulary import MODALITIES


class GroupConfig(Config):
    """A group of experts and the modalities whose tokens it takes, by the vocabulary's names."""

    modalities: tuple[str, ...] = Field(min_length=1)
    experts: int = Field(ge=1)

    @field_validator("modalities")
    @classmethod
    def _each_once(cls, modalities: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"{', '.join(modalities)}: name each modality once")
        return modalities


def named_groups(name: str) -> tuple[GroupConfig, ...]:
    """The groups of an architecture by the paper's name, such as `moe_4t4i` or `mod_moe_4t4i`.

    `mod` alone, and before another name, adds mixture-of-depths (`depth.py`) and leaves the groups
    as they are.

    Raises:
        UserError: the name is none of these.
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


class ExpertGroup(nn.Module):
    """The experts of one or more modalities, each a SwiGLU, run as one batched product.

    Args:
        dim, hidden: widths D and F of every expert.
        modalities: the group's, as the vocabulary numbers them.
        experts: number of experts E.
        share: the part of all tokens that belongs to these modalities; sets the static capacity.
    """

    def __init__(
        self, dim: int, hidden: int, modalities: Sequence[int], experts: int, share: float
    ):
        super().__init__()
        self.modalities, self.experts, self.share = tuple(modalities), experts, share
        self.gate_EDF = nn.Parameter(torch.empty(experts, dim, hidden))
        self.up_EDF = nn.Parameter(torch.empty(experts, dim, hidden))
        self.down_EFD = nn.Parameter(torch.empty(experts, hidden, dim))

    def forward(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, RouterReport | None]:
        """Route the tokens of the group's modalities; others get zeros.

        Args:
            x_ND: tokens of all modalities.
            modality_N: modality of each token, −1 for padding, which never competes.
            routing: see `Routing`.
        """
        eligible_N = self._eligible(modality_N)
        selection, report = self._select(x_ND, eligible_N, routing)
        return self._run(x_ND, selection), report

    def _eligible(self, modality_N: Tensor) -> Tensor:
        eligible_N = modality_N == self.modalities[0]
        for modality in self.modalities[1:]:
            eligible_N = eligible_N | (modality_N == modality)
        return eligible_N

    def _capacity(self, eligible_N: Tensor, routing: Routing) -> int:
        """K = share · N / E (static), or from the batch's own count (actual)."""
        if routing.capacity == "static":
            return static_capacity(self.share, eligible_N.shape[0], self.experts)
        return math.ceil(int(eligible_N.sum()) / self.experts)

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, RouterReport | None]:
        """Without a router (one expert): all tokens of the modality."""
        count = Routing(capacity="actual") if routing.by == "causal" else routing
        return take_all(eligible_N, self._capacity(eligible_N, count)), None

    def _run(self, x_ND: Tensor, selection: Selection) -> Tensor:
        """Gather, run every expert on its own tokens, and add the weighted outputs up."""
        token_EK = selection.token_EK
        x_EKD = x_ND[token_EK.flatten()].unflatten(0, token_EK.shape)
        hidden_EKF = functional.silu(x_EKD @ self.gate_EDF) * (x_EKD @ self.up_EDF)
        y_EKD = (hidden_EKF @ self.down_EFD) * selection.weight_EK[..., None]
        y_ND = torch.zeros_like(x_ND, dtype=y_EKD.dtype)
        return y_ND.index_add(0, token_EK.flatten(), y_EKD.flatten(0, 1)).to(x_ND.dtype)


class RoutedGroup(ExpertGroup):
    """A group of several experts: a main router scores, an auxiliary router foretells."""

    def __init__(
        self, dim: int, hidden: int, modalities: Sequence[int], experts: int, share: float
    ):
        super().__init__(dim, hidden, modalities, experts, share)
        self.router = nn.Linear(dim, experts, bias=False)
        self.auxiliary = AuxiliaryRouter(dim, experts)

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, RouterReport | None]:
        logits_NE = router_logits(self.router, x_ND)
        unsound = any_unsound(logits_NE, eligible_N)
        if routing.by == "causal":
            likelihood_NE = self.auxiliary(x_ND)
            unsound = unsound | any_unsound(likelihood_NE, eligible_N)
            selection = choose_causally(logits_NE, likelihood_NE, eligible_N)
            return selection, RouterReport(unsound, None)
        selection = choose_by_batch(logits_NE, eligible_N, self._capacity(eligible_N, routing))
        if not routing.record:
            return selection, RouterReport(unsound, None)
        chosen_NE = selection.chosen_NE(x_ND.shape[0])
        record = RouterRecord(chosen_NE, widen(self.auxiliary(x_ND)), eligible_N)
        return selection, RouterReport(unsound, record)


class DenseGroup(SwiGLU):
    """One expert for every modality is a plain feed-forward: nothing to route."""

    def forward(  # type: ignore[override]
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, RouterReport | None]:
        """Apply the feed-forward to every token, [N, D] to [N, D]."""
        return super().forward(x_ND), None


def static_capacity(share: float, tokens: int, experts: int = 1) -> int:
    """Slots of an expert, K = share · N / E, rounded up."""
    # The small slack keeps a product such as 0.3 · 10 from being rounded up.
    return math.ceil(share * tokens / experts - 1e-6)


def group_share(
    config: GroupConfig,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
    reach: float = 1.0,
) -> float:
    """The part of a layer's tokens that a group's static capacity is made for.

    Experts of a router divide what the modalities have by the recipe's shares. Where only some of
    the batch reaches the layer (`reach` < 1), nobody knows how many of them are of a modality; a
    lone expert, who takes every token, has room for as many as there can be.

    Raises:
        UserError: the group names a modality that is not among `modalities`.
    """
    unknown = [name for name in config.modalities if name not in modalities]
    if unknown:
        known = ", ".join(modalities)
        raise UserError(f"a group takes '{unknown[0]}', but the modalities are {known}")
    share = sum(shares[modalities.index(name)] for name in config.modalities)
    return min(1.0, share / reach) if config.experts == 1 else share


def make_group(
    dim: int,
    hidden: int,
    config: GroupConfig,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
    reach: float = 1.0,
) -> ExpertGroup | DenseGroup:
    """The cheapest module that computes a group.

    Args:
        dim, hidden: widths D and F.
        config: the group's modalities and number of experts.
        shares: the part of each modality among all tokens.
        modalities: their names, in the order of `shares`.
        reach: the part of all tokens that reach the layer; below 1 in mixture-of-depths.
    """
    share = group_share(config, shares, modalities, reach)
    if config.experts == 1 and set(config.modalities) == set(modalities):
        return DenseGroup(dim, hidden)
    kind = ExpertGroup if config.experts == 1 else RoutedGroup
    numbers = [modalities.index(name) for name in config.modalities]
    return kind(dim, hidden, numbers, config.experts, share)


class Experts(nn.Module):
    """The feed-forward of a layer: its groups, added up."""

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def forward(
        self, x_BSD: Tensor, modality_BS: Tensor, routing: Routing
    ) -> tuple[Tensor, list[RouterReport]]:
        """Map [B, S, D] to [B, S, D] and return what the routers tell.

        Group after group: under sharding, the next group's weights arrive while one computes.
        """
        x_ND, modality_N = x_BSD.flatten(0, 1), modality_BS.flatten()
        outputs, reports = zip(
            *(group(x_ND, modality_N, routing) for group in self.groups), strict=True
        )
        total_ND = sum(outputs[1:], start=outputs[0])
        return total_ND.view_as(x_BSD), [report for report in reports if report is not None]
