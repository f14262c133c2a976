"""Mixture of modality-aware experts: the feed-forward of a layer (MoMa §2.2, Equation 1).

    y(x) = Σ_j over the experts that took x  of  s_j(x) · FFN_j(x),   s(x) = sigmoid(x · W_M)

A layer holds one group of experts for each set of modalities; a token meets only the groups of its
own modality (first step, given), and inside a group the experts choose their tokens (second step,
learned: `routing.py`). Outputs of groups add, so groups may overlap. `add_expert_outputs` is the
equation; other ways to run the products, with equal results: `implementations.py`.
Shapes: see `layers.py`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from moma.errors import UserError
from moma.model.auxiliary import AuxiliaryRouter, Diagnostics, RouterOutput
from moma.model.implementations import (
    ExpertInputs,
    ImplementationName,
    add_grouped_outputs,
    merge_equal_capacity,
)
from moma.model.layers import SwiGLU, gather, scatter_add, upcast
from moma.model.routing import (
    Routing,
    Selection,
    any_nonfinite,
    causal_choice,
    expert_choice,
    logistic_noise,
    router_logits,
    select_all,
    static_capacity,
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


def add_expert_outputs(total_ND: Tensor, x_ND: Tensor, load: ExpertInputs) -> Tensor:
    """Equation 1: total + Σ_j s_j(x) · FFN_j(x) over the experts j that took x; [N, D] to [N, D].

    Args:
        total_ND: what other experts gave, in the precision in which outputs are added up.
        x_ND: tokens.
        load: the experts and the tokens that they took.
    """
    token_EK, _, score_EK = load.selection
    token_T = token_EK.flatten()
    x_EKD = gather(x_ND, token_T).unflatten(0, token_EK.shape)
    ffn_EKD = (functional.silu(x_EKD @ load.gate_EDF) * (x_EKD @ load.up_EDF)) @ load.down_EFD
    return scatter_add(total_ND, token_T, (score_EK[..., None] * ffn_EKD).flatten(0, 1))


def zero_total(x_ND: Tensor) -> Tensor:
    """Zeros to add the experts' outputs to: in fp32 at least, as scores and weights are.

    Not made as [N, D]: compiled, they would be taken for the zeros to which the backward of
    `gather` adds, and be kept for it.
    """
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    return x_ND.new_zeros(x_ND.numel(), dtype=dtype).view_as(x_ND)


class ExpertGroup(nn.Module):
    """The experts of one or more modalities, each a SwiGLU.

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
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing, total_ND: Tensor | None = None
    ) -> tuple[Tensor, Diagnostics | None]:
        """Route the tokens of the group's modalities and add what their experts give.

        Args:
            x_ND: tokens of all modalities.
            modality_N: modality of each token, −1 for padding, which never competes.
            routing: see `Routing`.
            total_ND: what other groups gave; left out, nothing.
        """
        load, report = self.load(x_ND, modality_N, routing)
        total_ND = zero_total(x_ND) if total_ND is None else total_ND
        return add_expert_outputs(total_ND, x_ND, load), report

    def load(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[ExpertInputs, Diagnostics | None]:
        """Route the tokens, but leave the products to be run with those of other groups."""
        selection, report = self._select(x_ND, self._eligible(modality_N), routing)
        return ExpertInputs(self.gate_EDF, self.up_EDF, self.down_EFD, selection), report

    def _eligible(self, modality_N: Tensor) -> Tensor:
        eligible_N = modality_N == self.modalities[0]
        for modality in self.modalities[1:]:
            eligible_N = eligible_N | (modality_N == modality)
        return eligible_N

    def _capacity(self, eligible_N: Tensor, routing: Routing) -> int:
        """K = share · N / E (static), or from the batch's own count (actual, and causally)."""
        if routing.mode == "choice" and routing.capacity == "static":
            return static_capacity(self.share, eligible_N.shape[0], self.experts)
        return math.ceil(int(eligible_N.sum()) / self.experts)

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, Diagnostics | None]:
        """Without a router (one expert): all tokens of the modality."""
        return select_all(eligible_N, self._capacity(eligible_N, routing)), None


class RoutedGroup(ExpertGroup):
    """A group of several experts: a main router scores, an auxiliary router foretells.

    Args:
        dim, hidden, modalities, experts, share: as for `ExpertGroup`.
        noise: whether logits get noise while training; see `logistic_noise`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        modalities: Sequence[int],
        experts: int,
        share: float,
        noise: bool = False,
    ):
        super().__init__(dim, hidden, modalities, experts, share)
        self.noise = noise
        self.router = nn.Linear(dim, experts, bias=False)
        self.auxiliary = AuxiliaryRouter(dim, experts)

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, Diagnostics | None]:
        logits_NE = router_logits(self.router.weight, x_ND)
        if self.noise and self.training and routing.mode == "choice":
            logits_NE = logits_NE + logistic_noise(logits_NE)
        nonfinite = any_nonfinite(logits_NE, eligible_N)
        if routing.mode == "causal":
            auxiliary_logits_NE = self.auxiliary(x_ND)
            nonfinite = nonfinite | any_nonfinite(auxiliary_logits_NE, eligible_N)
            selection = causal_choice(logits_NE, auxiliary_logits_NE, eligible_N)
            return selection, Diagnostics(nonfinite, None)
        selection = expert_choice(logits_NE, eligible_N, self._capacity(eligible_N, routing))
        if not routing.reported:
            return selection, Diagnostics(nonfinite, None)
        selected_NE = selection.selected_NE(x_ND.shape[0])
        auxiliary_logits_NE = None
        if routing.record_auxiliary:
            auxiliary_logits_NE = upcast(self.auxiliary(x_ND))
            nonfinite = nonfinite | any_nonfinite(auxiliary_logits_NE, eligible_N)
        record = RouterOutput(selected_NE, auxiliary_logits_NE, eligible_N, logits_NE.detach())
        return selection, Diagnostics(nonfinite, record)


class DenseGroup(SwiGLU):
    """One expert for every modality is a plain feed-forward: nothing to route."""

    def forward(  # type: ignore[override]
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing, total_ND: Tensor | None = None
    ) -> tuple[Tensor, Diagnostics | None]:
        """Apply the feed-forward to every token and add it to the total, [N, D] to [N, D]."""
        y_ND = super().forward(x_ND)
        return y_ND if total_ND is None else total_ND + y_ND, None


def group_share(
    config: GroupConfig,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
    token_fraction: float = 1.0,
) -> float:
    """The part of a layer's tokens that a group's static capacity is made for.

    Experts of a router divide what the modalities have by the recipe's shares. Where only some of
    the batch reaches the layer (`token_fraction` < 1), nobody knows how many of them are of a
    modality; a
    lone expert, who takes every token, has room for as many as there can be.

    Raises:
        UserError: the group names a modality that is not among `modalities`.
    """
    unknown = [name for name in config.modalities if name not in modalities]
    if unknown:
        known = ", ".join(modalities)
        raise UserError(f"a group takes '{unknown[0]}', but the modalities are {known}")
    share = sum(shares[modalities.index(name)] for name in config.modalities)
    return min(1.0, share / token_fraction) if config.experts == 1 else share


def build_group(
    dim: int,
    hidden: int,
    config: GroupConfig,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
    token_fraction: float = 1.0,
    noise: bool = False,
) -> ExpertGroup | DenseGroup:
    """The cheapest module that computes a group.

    Args:
        dim, hidden: widths D and F.
        config: the group's modalities and number of experts.
        shares: the part of each modality among all tokens.
        modalities: their names, in the order of `shares`.
        token_fraction: the fraction of all tokens that reaches the layer; below 1 in
        mixture-of-depths.
        noise: whether a router's logits get noise while training.
    """
    share = group_share(config, shares, modalities, token_fraction)
    if config.experts == 1 and set(config.modalities) == set(modalities):
        return DenseGroup(dim, hidden)
    numbers = [modalities.index(name) for name in config.modalities]
    if config.experts == 1:
        return ExpertGroup(dim, hidden, numbers, 1, share)
    return RoutedGroup(dim, hidden, numbers, config.experts, share, noise)


def max_groups_per_modality(modalities: Iterable[Iterable[int | str]]) -> int:
    """The largest number of groups that take the same modality, from the modalities of each."""
    return max(Counter(chain.from_iterable(modalities)).values(), default=0)


class MixtureOfExperts(nn.Module):
    """The feed-forward of a layer: its groups, added up, one after the other (`sequential`)."""

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def forward(
        self, x_BSD: Tensor, modality_BS: Tensor, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Map [B, S, D] to [B, S, D] and return what the routers tell."""
        total_ND, reports = self._add_up(x_BSD.flatten(0, 1), modality_BS.flatten(), routing)
        told = [report for report in reports if report is not None]
        return total_ND.to(x_BSD.dtype).view_as(x_BSD), told

    def _add_up(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics | None]]:
        total_ND, reports = None, []
        for group in self.groups:
            total_ND, report = group(x_ND, modality_N, routing, total_ND)
            reports.append(report)
        assert total_ND is not None
        return total_ND, reports

    def units(self) -> list[nn.Module]:
        """The parts that may be sharded one by one: the next is gathered while one computes."""
        return list(self.groups) if len(self.groups) > 1 else []


class JointMixtureOfExperts(MixtureOfExperts):
    """The same, all groups run together (`batched`, `grouped`); the weights stay with the groups.

    Args:
        groups: all but those in `choosing` are plain feed-forwards.
        choosing: the groups whose experts take some tokens.
        run: adds to a total [N, D] what the experts of some loads give.
    """

    def __init__(
        self,
        groups: Sequence[ExpertGroup | DenseGroup],
        choosing: Sequence[ExpertGroup],
        run: Callable[[Tensor, Tensor, Sequence[ExpertInputs]], Tensor],
    ):
        super().__init__(groups)
        self.run, self._choosing = run, list(choosing)
        self._plain = [group for group in groups if group not in choosing]

    def _add_up(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics | None]]:
        loads, reports = zip(
            *(group.load(x_ND, modality_N, routing) for group in self._choosing), strict=True
        )
        total_ND = self.run(zero_total(x_ND), x_ND, loads)
        for group in self._plain:
            total_ND, _ = group(x_ND, modality_N, routing, total_ND)
        return total_ND, list(reports)

    def units(self) -> list[nn.Module]:
        """None: all weights are needed at once."""
        return []


def build_experts(
    groups: Sequence[ExpertGroup | DenseGroup], run: ImplementationName
) -> MixtureOfExperts:
    """The feed-forward of a layer, run by a strategy; the names of weights do not depend on it."""
    choosing = [group for group in groups if isinstance(group, ExpertGroup)]
    if run == "sequential" or not choosing:
        return MixtureOfExperts(groups)
    if run == "batched":
        return JointMixtureOfExperts(groups, choosing, add_batched_outputs)
    lone = max_groups_per_modality(group.modalities for group in choosing if group.experts == 1)
    return JointMixtureOfExperts(
        groups, choosing, partial(add_grouped_outputs, single_expert_overlap=lone)
    )


def add_batched_outputs(total_ND: Tensor, x_ND: Tensor, loads: Sequence[ExpertInputs]) -> Tensor:
    """Equation 1 for several groups, those of equal capacity in one batched product."""
    for load in merge_equal_capacity(loads):
        total_ND = add_expert_outputs(total_ND, x_ND, load)
    return total_ND
