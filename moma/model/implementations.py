"""Three implementations of the experts' computation with equal results (MoMa §3).

- `sequential`: one group after another (`add_expert_outputs` in `experts.py`). Each group can be
  sharded on its own: the next one's weights are gathered while one computes. The paper's choice.
- `batched`: groups of equal capacity in one batched product; their weights are concatenated.
- `grouped`: all experts in one grouped product, with one gather and one scatter-add. Slots that
  must be empty are skipped.

Shapes: see `layers.py`; T is the number of flattened slots of all experts.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moma.model.grouped import grouped_product
from moma.model.layers import gather, scatter_add
from moma.model.routing import Selection

ImplementationName = Literal["sequential", "batched", "grouped"]


class ExpertInputs(NamedTuple):
    """Experts and the tokens routed to them.

    Attributes:
        gate_EDF, up_EDF, down_EFD: SwiGLU weights of the experts.
        selection: the tokens of each expert, [E, K].
    """

    gate_EDF: Tensor
    up_EDF: Tensor
    down_EFD: Tensor
    selection: Selection


def merge_equal_capacity(inputs: Sequence[ExpertInputs]) -> list[ExpertInputs]:
    """Concatenate the groups whose experts have the same number of slots."""
    by_capacity: dict[int, list[ExpertInputs]] = {}
    for group in inputs:
        by_capacity.setdefault(group.selection.token_EK.shape[1], []).append(group)
    return [_concatenate(groups) for groups in by_capacity.values()]


def _concatenate(inputs: Sequence[ExpertInputs]) -> ExpertInputs:
    if len(inputs) == 1:
        return inputs[0]
    gate, up, down, selections = zip(*inputs, strict=True)
    selection = Selection(*(torch.cat(parts) for parts in zip(*selections, strict=True)))
    return ExpertInputs(torch.cat(gate), torch.cat(up), torch.cat(down), selection)


def add_grouped_outputs(
    total_ND: Tensor, x_ND: Tensor, inputs: Sequence[ExpertInputs], single_expert_overlap: int
) -> Tensor:
    """Equation 1 for all experts in one grouped product; returns the new total [N, D].

    Args:
        total_ND: outputs of other experts, to add to.
        x_ND: tokens.
        inputs: groups, which may differ in number of experts and in capacity.
        single_expert_overlap: how many single-expert groups process the same modality, at most.
            Together such groups hold at most that many times N tokens, whatever their capacities.
    """
    gate, up, down, _ = zip(*inputs, strict=True)
    (token_T, _, score_T), end_E = _flatten_slots(inputs, single_expert_overlap * len(x_ND))
    x_TD = gather(x_ND, token_T)
    gate_TF, up_TF = (grouped_product(x_TD, weights, end_E) for weights in (gate, up))
    ffn_TD = grouped_product(functional.silu(gate_TF) * up_TF, down, end_E)
    return scatter_add(total_ND, token_T, score_T[:, None] * ffn_TD)


def _flatten_slots(
    inputs: Sequence[ExpertInputs], single_expert_tokens: int
) -> tuple[Selection, Tensor]:
    """Flatten the slots of all experts, expert after expert.

    If single-expert groups have more slots than `single_expert_tokens`, the surplus of empty slots
    is dropped. Empty slots that remain, to keep the shape static, come last.

    Returns:
        The flattened selection, each part [T], and the end of each expert's slots, int32 [E].
    """
    selections = [group.selection for group in inputs]
    flat_T = Selection(
        *(torch.cat([part.flatten() for part in parts]) for parts in zip(*selections, strict=True))
    )
    slots = len(flat_T.token_EK)
    single_expert_slots = sum(s.token_EK.numel() for s in selections if len(s.token_EK) == 1)
    kept = slots - max(0, single_expert_slots - single_expert_tokens)
    if kept == slots:
        counted_EK = [torch.ones_like(s.token_EK) for s in selections]
    else:
        order_T = (~flat_T.filled_EK).byte().sort(stable=True).indices[:kept]
        flat_T = Selection(*(part[order_T] for part in flat_T))
        counted_EK = [s.filled_EK for s in selections]
    end_E = torch.cat([each.sum(1) for each in counted_EK]).cumsum(0)
    return flat_T, torch.cat((end_E[:-1], end_E.new_full((1,), kept))).int()
