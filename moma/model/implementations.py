"""Four implementations of the experts' computation with equal results (MoMa §3.2).

- `sequential`: one group after another (`MixtureOfExperts`). Each group can be sharded on its own:
  the next one's weights are gathered while one computes. The paper's choice.
- `batched`: groups of equal capacity in one batched product; their weights are concatenated.
- `grouped`: single-expert groups in one grouped product, which skips slots that must be empty;
  other groups one after another.
- `triton`: like `sequential`, with kernels of our own on a GPU (`fused_experts.py`).

Shapes: see `layers.py`; T is the number of flattened slots of all experts.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.dispatch import Dispatch, ScatterSlots
from moma.model.experts import (
    DenseGroup,
    ExpertGroup,
    GroupTokens,
    MixtureOfExperts,
    RoutedExperts,
    add_expert_outputs,
    add_ragged_outputs,
    zero_total,
)
from moma.model.fused_experts import add_fused_outputs
from moma.model.grouped import Product, grouped_product, row_alignment
from moma.model.groups import (
    GroupConfig,
    TokenChoiceConfig,
    group_capacity_share,
    max_groups_per_modality,
)
from moma.model.routers import Diagnostics
from moma.model.routing import RaggedSelection, Routing, Selection
from moma.model.token_choice import TokenChoiceGroup
from moma.vocabulary import MODALITIES

ImplementationName = Literal["sequential", "batched", "grouped", "triton"]


class JointMixtureOfExperts(MixtureOfExperts):
    """A feed-forward that computes its groups together; parameters stay in the groups."""

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__(groups)
        self.dispatch = next(group.dispatch for group in groups if isinstance(group, ExpertGroup))
        self.product: Product = grouped_product

    def sum_groups(
        self, x_ND: Tensor, group_tokens: Sequence[GroupTokens | None], routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """See `MixtureOfExperts`."""
        stacks = [group for group in self.groups if isinstance(group, ExpertGroup)]
        if any(group.is_ragged(routing) for group in stacks):  # computed group by group
            return super().sum_groups(x_ND, group_tokens, routing)
        routed: list[RoutedExperts] = []
        diagnostics: list[Diagnostics] = []
        for group, own_tokens in zip(self.groups, group_tokens, strict=True):
            if isinstance(group, ExpertGroup):
                assert own_tokens is not None
                experts, found = group.route(x_ND, own_tokens, routing)
                routed.append(experts)
                diagnostics += found
        total_ND = self.add_outputs(zero_total(x_ND), x_ND, routed)
        for group in self.groups:
            if isinstance(group, DenseGroup):
                total_ND, _ = group(x_ND, None, routing, total_ND)
        return total_ND, diagnostics

    def add_outputs(
        self, total_ND: Tensor, x_ND: Tensor, routed: Sequence[RoutedExperts]
    ) -> Tensor:
        """Equation 1 for several groups: add their experts' outputs to the total, [N, D]."""
        raise NotImplementedError

    def units(self) -> list[nn.Module]:
        """None: all weights are needed at once, so they are gathered with the layer."""
        return []


class BatchedExperts(JointMixtureOfExperts):
    """Groups of equal capacity in one batched product."""

    def add_outputs(
        self, total_ND: Tensor, x_ND: Tensor, routed: Sequence[RoutedExperts]
    ) -> Tensor:
        """See `JointMixtureOfExperts`."""
        by_capacity: dict[int, list[RoutedExperts]] = {}
        for group in routed:
            by_capacity.setdefault(group.selection.index_EK.shape[1], []).append(group)
        parts = (self.dispatch, self.product)
        for groups in by_capacity.values():
            total_ND = add_expert_outputs(total_ND, x_ND, _concatenate(groups), *parts)
        return total_ND


class GroupedExperts(JointMixtureOfExperts):
    """Single-expert groups in one grouped product, other groups one by one.

    With mixture-of-depths each single-expert group has a slot for every token that reaches the
    layer, but most remain empty: the groups share as many slots as they can fill together.
    """

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__(groups)
        # Single-expert groups together hold at most this many times N tokens.
        self.single_expert_overlap = max_groups_per_modality(
            group.modalities
            for group in groups
            if isinstance(group, ExpertGroup) and group.num_experts == 1
        )

    def add_outputs(
        self, total_ND: Tensor, x_ND: Tensor, routed: Sequence[RoutedExperts]
    ) -> Tensor:
        """See `JointMixtureOfExperts`."""
        parts = (self.dispatch, self.product)
        single = [each for each in routed if len(each.selection.index_EK) == 1]
        alignment = row_alignment(x_ND.device)
        filled = self.single_expert_overlap * len(x_ND) + (alignment - 1) * len(single)
        shared = -(-filled // alignment) * alignment
        if shared < sum(each.selection.index_EK.numel() for each in single):
            *weights, selections = zip(*single, strict=True)
            joint = share_slots(selections, shared, alignment)
            total_ND = add_ragged_outputs(total_ND, x_ND, weights, joint, *parts)
            routed = [each for each in routed if len(each.selection.index_EK) > 1]
        for each in routed:
            total_ND = add_expert_outputs(total_ND, x_ND, each, *parts)
        return total_ND


class TritonExperts(MixtureOfExperts):
    """Groups one after another, by Triton kernels where these run."""

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__(groups)
        for group in groups:
            if isinstance(group, ExpertGroup):
                group.add_outputs = add_fused_outputs


def build_group(
    dim: int,
    hidden: int,
    config: GroupConfig,
    shares: Sequence[float],
    modalities: Sequence[str] = MODALITIES,
    token_fraction: float = 1.0,
    noise: bool = False,
    dispatch: Dispatch = ScatterSlots,
    token_choice: TokenChoiceConfig | None = None,
) -> ExpertGroup | DenseGroup:
    """Build the simplest module that computes a group.

    Args:
        dim, hidden, noise, dispatch: as for `ExpertGroup`.
        config, shares, modalities, token_fraction, token_choice: as for `group_capacity_share`.
    """
    share = group_capacity_share(config, shares, modalities, token_fraction, token_choice)
    if config.is_dense(modalities):
        return DenseGroup(dim, hidden)
    indices = [modalities.index(name) for name in config.modalities]
    stack = (dim, hidden, indices, config.experts, share, noise, dispatch)
    if token_choice is None or config.experts == 1:
        return ExpertGroup(*stack)
    return TokenChoiceGroup(token_choice, *stack)


def build_experts(
    groups: Sequence[ExpertGroup | DenseGroup], implementation: ImplementationName
) -> MixtureOfExperts:
    """Build the feed-forward of a layer; parameter names do not depend on the implementation."""
    if not any(isinstance(group, ExpertGroup) for group in groups):
        return MixtureOfExperts(groups)
    classes = {
        "sequential": MixtureOfExperts,
        "batched": BatchedExperts,
        "grouped": GroupedExperts,
        "triton": TritonExperts,
    }
    return classes[implementation](groups)


def _concatenate(routed: Sequence[RoutedExperts]) -> RoutedExperts:
    if len(routed) == 1:
        return routed[0]
    gate, up, down, selections = zip(*routed, strict=True)
    selection = Selection(*(torch.cat(parts) for parts in zip(*selections, strict=True)))
    return RoutedExperts(torch.cat(gate), torch.cat(up), torch.cat(down), selection)


def share_slots(selections: Sequence[Selection], shared: int, alignment: int) -> RaggedSelection:
    """Arrange the filled slots of single experts one after another; the remaining ones come last.

    Args:
        selections: of each expert, [1, K], filled slots first.
        shared: number of slots T, enough for all that are filled.
        alignment: each expert gets a multiple of it, which divides `shared`.
    """
    count_E = torch.stack([selection.filled_EK.sum() for selection in selections])
    end_E = ((count_E + alignment - 1) // alignment * alignment).cumsum(0)
    start_E = functional.pad(end_E[:-1], (1, 0))
    end_E = torch.cat((end_E[:-1], end_E.new_full((1,), shared)))
    slot_T = torch.arange(shared, device=end_E.device)
    expert_T = (slot_T[:, None] >= end_E).sum(1)
    place_T = slot_T - start_E[expert_T]
    filled_T = place_T < count_E[expert_T]
    capacity = max(selection.index_EK.shape[1] for selection in selections)
    index_EK = torch.cat(
        [functional.pad(s.index_EK, (0, capacity - s.index_EK.shape[1])) for s in selections]
    )
    index_T = index_EK[expert_T, place_T.clamp(max=capacity - 1)]
    return RaggedSelection(index_T, expert_T, filled_T, filled_T.float(), end_E.int())
