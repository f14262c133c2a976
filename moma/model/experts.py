"""Mixture of modality-aware experts: the feed-forward of a layer (MoMa §2.2, Equation 1).

    y(x) = Σ_j s_j(x) · FFN_j(x)  over the experts j that selected x,    s(x) = sigmoid(x · W_M)

Routing has two stages. By modality: a layer has one group of experts per set of modalities, and a
token is seen only by the groups of its modality. Within a group: each expert selects tokens
(`routing.py`). The outputs of all groups are summed, so groups may overlap.

`add_expert_outputs` is Equation 1; `implementations.py` has faster ways to compute it.

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
from moma.model.implementations import (
    ExpertInputs,
    ImplementationName,
    add_grouped_outputs,
    merge_equal_capacity,
)
from moma.model.layers import SwiGLU, gather, scatter_add
from moma.model.routers import AuxiliaryRouter, Diagnostics, select_tokens
from moma.model.routing import (
    Routing,
    Selection,
    expert_choice,
    logistic_noise,
    router_logits,
    select_all,
    static_capacity,
)
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


def add_expert_outputs(total_ND: Tensor, x_ND: Tensor, inputs: ExpertInputs) -> Tensor:
    """Equation 1: total + Σ_j s_j(x) · FFN_j(x) over the experts j that selected x, [N, D].

    Args:
        total_ND: outputs of other experts, to add to; its dtype is that of the sum.
        x_ND: tokens.
        inputs: the experts and their selected tokens.
    """
    token_EK, _, score_EK = inputs.selection
    token_T = token_EK.flatten()
    x_EKD = gather(x_ND, token_T).unflatten(0, token_EK.shape)
    ffn_EKD = (functional.silu(x_EKD @ inputs.gate_EDF) * (x_EKD @ inputs.up_EDF)) @ inputs.down_EFD
    return scatter_add(total_ND, token_T, (score_EK[..., None] * ffn_EKD).flatten(0, 1))


def add_batched_outputs(total_ND: Tensor, x_ND: Tensor, inputs: Sequence[ExpertInputs]) -> Tensor:
    """Equation 1 for several groups, those of equal capacity in one batched product."""
    for merged in merge_equal_capacity(inputs):
        total_ND = add_expert_outputs(total_ND, x_ND, merged)
    return total_ND


def zero_total(x_ND: Tensor) -> Tensor:
    """Zeros [N, D] to sum expert outputs into, in at least fp32, like scores and weights.

    Allocated flat: torch.compile would merge zeros [N, D] with those of the backward of `gather`,
    and keep them alive for it.
    """
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    return x_ND.new_zeros(x_ND.numel(), dtype=dtype).view_as(x_ND)


class ExpertGroup(nn.Module):
    """The experts of one or more modalities, each a SwiGLU. Subclasses select the tokens.

    Args:
        dim, hidden: widths D and F of every expert.
        modalities: indices of the group's modalities.
        experts: number of experts E.
        share: fraction of all tokens that static capacity is computed for; see `group_share`.
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
        """Route the tokens of the group's modalities and add the experts' outputs.

        Args:
            x_ND: tokens of all modalities.
            modality_N: modality of each token; −1 for padding, which is never selected.
            routing: see `Routing`.
            total_ND: outputs of other groups, to add to; if omitted, zeros.
        """
        inputs, diagnostics = self.route(x_ND, modality_N, routing)
        total_ND = zero_total(x_ND) if total_ND is None else total_ND
        return add_expert_outputs(total_ND, x_ND, inputs), diagnostics

    def route(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[ExpertInputs, Diagnostics | None]:
        """Select tokens for each expert, without computing the experts."""
        eligible_N = modality_N == self.modalities[0]
        for modality in self.modalities[1:]:
            eligible_N = eligible_N | (modality_N == modality)
        selection, diagnostics = self._select(x_ND, eligible_N, routing)
        inputs = ExpertInputs(self.gate_EDF, self.up_EDF, self.down_EFD, selection)
        return inputs, diagnostics

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, Diagnostics | None]:
        raise NotImplementedError

    def _capacity(self, eligible_N: Tensor, routing: Routing) -> int:
        """K = share · N / E if static; otherwise from the number of eligible tokens."""
        if routing.mode == "choice" and routing.capacity == "static":
            return static_capacity(self.share, len(eligible_N), self.experts)
        return math.ceil(int(eligible_N.sum()) / self.experts)


class SingleExpertGroup(ExpertGroup):
    """A group of one expert, which processes every token of its modalities: no router."""

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, Diagnostics | None]:
        return select_all(eligible_N, self._capacity(eligible_N, routing)), None


class RoutedGroup(ExpertGroup):
    """A group of several experts with a main and an auxiliary router.

    Args:
        dim, hidden, modalities, experts, share: as for `ExpertGroup`.
        noise: whether router logits get Gumbel-Sigmoid noise in training; see `logistic_noise`.
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

        def batch_choice(logits_NE: Tensor) -> Selection:
            return expert_choice(logits_NE, eligible_N, self._capacity(eligible_N, routing))

        return select_tokens(x_ND, logits_NE, self.auxiliary, eligible_N, routing, batch_choice)


class DenseGroup(SwiGLU):
    """One expert for all modalities: an ordinary feed-forward without routing."""

    def forward(  # type: ignore[override]
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing, total_ND: Tensor | None = None
    ) -> tuple[Tensor, Diagnostics | None]:
        """Apply the feed-forward to every token and add it to the total, [N, D]."""
        y_ND = super().forward(x_ND)
        return y_ND if total_ND is None else total_ND + y_ND, None


def group_share(
    config: GroupConfig,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
    token_fraction: float = 1.0,
) -> float:
    """Return the fraction of a layer's tokens that a group's static capacity is computed for.

    For a routed group this is the share of its modalities. A single-expert group must hold every
    token of its modalities, and if only some tokens reach the layer (`token_fraction` < 1), all of
    those could belong to it.

    Args:
        config: the group.
        shares: fraction of each modality among all tokens.
        modalities: names of the modalities, in the order of `shares`.
        token_fraction: fraction of all tokens that reach the layer; below 1 with mixture-of-depths.

    Raises:
        UserError: the group names a modality that is not among `modalities`.
    """
    unknown = [name for name in config.modalities if name not in modalities]
    if unknown:
        known = ", ".join(modalities)
        raise UserError(f"groups: unknown modality '{unknown[0]}'; the modalities are {known}")
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
    """Build the simplest module that computes a group.

    Args:
        dim, hidden: widths D and F.
        config, shares, modalities, token_fraction: as for `group_share`.
        noise: as for `RoutedGroup`.
    """
    share = group_share(config, shares, modalities, token_fraction)
    if config.experts == 1 and set(config.modalities) == set(modalities):
        return DenseGroup(dim, hidden)
    indices = [modalities.index(name) for name in config.modalities]
    if config.experts == 1:
        return SingleExpertGroup(dim, hidden, indices, 1, share)
    return RoutedGroup(dim, hidden, indices, config.experts, share, noise)


def max_groups_per_modality(modalities: Iterable[Iterable[int | str]]) -> int:
    """Return the largest number of groups that share a modality, given each group's modalities."""
    return max(Counter(chain.from_iterable(modalities)).values(), default=0)


class MixtureOfExperts(nn.Module):
    """The feed-forward of a layer: the sum of its groups, computed one after another."""

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def forward(
        self, x_BSD: Tensor, modality_BS: Tensor, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Map [B, S, D] to [B, S, D] and return the diagnostics of the routers."""
        total_ND, diagnostics = self._sum(x_BSD.flatten(0, 1), modality_BS.flatten(), routing)
        y_BSD = total_ND.to(x_BSD.dtype).view_as(x_BSD)
        return y_BSD, [each for each in diagnostics if each is not None]

    def _sum(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, Sequence[Diagnostics | None]]:
        total_ND, diagnostics = None, []
        for group in self.groups:
            total_ND, of_group = group(x_ND, modality_N, routing, total_ND)
            diagnostics.append(of_group)
        assert total_ND is not None
        return total_ND, diagnostics

    def units(self) -> list[nn.Module]:
        """Modules to shard separately: the weights of one are gathered while another computes."""
        return list(self.groups) if len(self.groups) > 1 else []


class JointMixtureOfExperts(MixtureOfExperts):
    """The same with the groups computed together (`batched`, `grouped`).

    Args:
        groups: the groups; parameters stay in them, under the same names.
        add_outputs: adds the outputs of several groups' experts to a total [N, D].
    """

    def __init__(
        self,
        groups: Sequence[ExpertGroup | DenseGroup],
        add_outputs: Callable[[Tensor, Tensor, Sequence[ExpertInputs]], Tensor],
    ):
        super().__init__(groups)
        self.add_outputs = add_outputs

    def _sum(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, Sequence[Diagnostics | None]]:
        groups = [group for group in self.groups if isinstance(group, ExpertGroup)]
        routed = [group.route(x_ND, modality_N, routing) for group in groups]
        inputs, diagnostics = zip(*routed, strict=True)
        total_ND = self.add_outputs(zero_total(x_ND), x_ND, inputs)
        for group in self.groups:
            if isinstance(group, DenseGroup):
                total_ND, _ = group(x_ND, modality_N, routing, total_ND)
        return total_ND, diagnostics

    def units(self) -> list[nn.Module]:
        """No separate units: all weights are needed at once."""
        return []


def build_experts(
    groups: Sequence[ExpertGroup | DenseGroup], implementation: ImplementationName
) -> MixtureOfExperts:
    """Build the feed-forward of a layer; parameter names do not depend on the implementation."""
    expert_groups = [group for group in groups if isinstance(group, ExpertGroup)]
    if implementation == "sequential" or not expert_groups:
        return MixtureOfExperts(groups)
    if implementation == "batched":
        return JointMixtureOfExperts(groups, add_batched_outputs)
    single = [group.modalities for group in expert_groups if group.experts == 1]
    overlap = max_groups_per_modality(single)
    add_outputs = partial(add_grouped_outputs, single_expert_overlap=overlap)
    return JointMixtureOfExperts(groups, add_outputs)
