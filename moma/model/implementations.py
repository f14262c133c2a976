"""Three implementations of the experts' computation with equal results (MoMa §3).

- `sequential`: one group after another (`MixtureOfExperts`). Each group can be sharded on its own:
  the next one's weights are gathered while one computes. The paper's choice.
- `batched`: groups of equal capacity in one batched product; their weights are concatenated.
- `grouped`: all experts in one grouped product, with one gather and one scatter-add. Slots that
  must be empty are skipped.

Shapes: see `layers.py`; T is the number of flattened slots of all experts.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.experts import (
    DenseGroup,
    ExpertGroup,
    ExpertInputs,
    MixtureOfExperts,
    add_expert_outputs,
    zero_total,
)
from moma.model.grouped import grouped_product
from moma.model.groups import max_groups_per_modality
from moma.model.layers import gather, scatter_add
from moma.model.routers import Diagnostics
from moma.model.routing import Routing, Selection

ImplementationName = Literal["sequential", "batched", "grouped"]


class JointMixtureOfExperts(MixtureOfExperts):
    """A feed-forward that computes its groups together; parameters stay in the groups."""

    def sum_groups(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """See `MixtureOfExperts`."""
        if routing.mode == "causal":  # the list of an expert's tokens is computed group by group
            return super().sum_groups(x_ND, modality_N, routing)
        inputs: list[ExpertInputs] = []
        diagnostics: list[Diagnostics] = []
        for group in self.groups:
            if isinstance(group, ExpertGroup):
                of_group, found = group.route(x_ND, modality_N, routing)
                inputs.append(of_group)
                diagnostics += found
        total_ND = self.add_outputs(zero_total(x_ND), x_ND, inputs)
        for group in self.groups:
            if isinstance(group, DenseGroup):
                total_ND, _ = group(x_ND, modality_N, routing, total_ND)
        return total_ND, diagnostics

    def add_outputs(self, total_ND: Tensor, x_ND: Tensor, inputs: Sequence[ExpertInputs]) -> Tensor:
        """Equation 1 for several groups: add their experts' outputs to a total [N, D]."""
        raise NotImplementedError

    def units(self) -> list[nn.Module]:
        """No separate units: all weights are needed at once."""
        return []


class BatchedExperts(JointMixtureOfExperts):
    """Groups of equal capacity in one batched product."""

    def add_outputs(self, total_ND: Tensor, x_ND: Tensor, inputs: Sequence[ExpertInputs]) -> Tensor:
        """See `JointMixtureOfExperts`."""
        by_capacity: dict[int, list[ExpertInputs]] = {}
        for group in inputs:
            by_capacity.setdefault(group.selection.index_EK.shape[1], []).append(group)
        for groups in by_capacity.values():
            total_ND = add_expert_outputs(total_ND, x_ND, _concatenate(groups))
        return total_ND


class GroupedExperts(JointMixtureOfExperts):
    """All experts in one grouped product; groups may differ in number of experts and capacity."""

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__(groups)
        routed = [group for group in groups if isinstance(group, ExpertGroup)]
        # Single-expert groups together hold at most this many times N tokens.
        self.single_expert_overlap = max_groups_per_modality(
            group.modalities for group in routed if group.num_experts == 1
        )

    def add_outputs(self, total_ND: Tensor, x_ND: Tensor, inputs: Sequence[ExpertInputs]) -> Tensor:
        """See `JointMixtureOfExperts`."""
        gate, up, down, _ = zip(*inputs, strict=True)
        max_single_tokens = self.single_expert_overlap * len(x_ND)
        (index_T, _, score_T), end_E = _flatten_slots(inputs, max_single_tokens)
        x_TD = gather(x_ND, index_T)
        gate_TF, up_TF = (grouped_product(x_TD, weights, end_E) for weights in (gate, up))
        ffn_TD = grouped_product(functional.silu(gate_TF) * up_TF, down, end_E)
        return scatter_add(total_ND, index_T, score_T[:, None] * ffn_TD)


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
    }
    return classes[implementation](groups)


def _concatenate(inputs: Sequence[ExpertInputs]) -> ExpertInputs:
    if len(inputs) == 1:
        return inputs[0]
    gate, up, down, selections = zip(*inputs, strict=True)
    selection = Selection(*(torch.cat(parts) for parts in zip(*selections, strict=True)))
    return ExpertInputs(torch.cat(gate), torch.cat(up), torch.cat(down), selection)


def _flatten_slots(
    inputs: Sequence[ExpertInputs], max_single_tokens: int
) -> tuple[Selection, Tensor]:
    """Flatten the slots of all experts, expert after expert.

    If single-expert groups have more slots than `max_single_tokens`, the surplus of empty slots
    is dropped. Empty slots that remain, to keep the shape static, come last.

    Returns:
        The flattened selection, each part [T], and the end of each expert's slots, int32 [E].
    """
    selections = [group.selection for group in inputs]
    flat_T = Selection(
        *(torch.cat([part.flatten() for part in parts]) for parts in zip(*selections, strict=True))
    )
    slots = len(flat_T.index_EK)
    single_expert_slots = sum(s.index_EK.numel() for s in selections if len(s.index_EK) == 1)
    kept = slots - max(0, single_expert_slots - max_single_tokens)
    if kept == slots:
        counted_EK = [torch.ones_like(s.index_EK) for s in selections]
    else:
        order_T = (~flat_T.filled_EK).byte().sort(stable=True).indices[:kept]
        flat_T = Selection(*(part[order_T] for part in flat_T))
        counted_EK = [s.filled_EK for s in selections]
    end_E = torch.cat([each.sum(1) for each in counted_EK]).cumsum(0)
    return flat_T, torch.cat((end_E[:-1], end_E.new_full((1,), kept))).int()
