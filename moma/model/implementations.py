"""Running experts on the tokens they took: three strategies, one result (MoMa §3).

- `sequential`: group after group (`add_expert_outputs` in `experts.py`), so that each may be a
  shard unit of its own: the next one's weights arrive while one computes. The paper's choice.
- `batched`: groups of equal capacity in one batched product. Their weights are put side by side.
- `grouped`: all experts in one product of unequal parts, one gather and one scatter. Slots that
  are known to hold no token are left out.

Shapes: see `layers.py`; T are the slots of all experts together, E in `grouped` all experts.
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
    """The experts of a group and what they have to do.

    Attributes:
        gate_EDF, up_EDF, down_EFD: their weights.
        selection: the tokens that they took, [E, K].
    """

    gate_EDF: Tensor
    up_EDF: Tensor
    down_EFD: Tensor
    selection: Selection


def merge_equal_capacity(loads: Sequence[ExpertInputs]) -> list[ExpertInputs]:
    """Loads whose experts have as many slots, put together as one load."""
    alike: dict[int, list[ExpertInputs]] = {}
    for load in loads:
        alike.setdefault(load.selection.token_EK.shape[1], []).append(load)
    return [_merge(each) for each in alike.values()]


def add_grouped_outputs(
    total_ND: Tensor, x_ND: Tensor, loads: Sequence[ExpertInputs], single_expert_overlap: int
) -> Tensor:
    """All experts in one grouped product, added to a total; [N, D] to [N, D].

    Args:
        total_ND: what other experts gave.
        x_ND: tokens.
        loads: may differ in experts and in capacity.
        single_expert_overlap: how many of the groups of one expert can take the same token. Such
        groups
            together hold at most that many times N tokens, whatever their capacities say.
    """
    gate, up, down, _ = zip(*loads, strict=True)
    (token_T, _, score_T), end_E = _slots(loads, single_expert_overlap * len(x_ND))
    x_TD = gather(x_ND, token_T)
    gate_TF, up_TF = (grouped_product(x_TD, part, end_E) for part in (gate, up))
    ffn_TD = grouped_product(functional.silu(gate_TF) * up_TF, down, end_E)
    return scatter_add(total_ND, token_T, score_T[:, None] * ffn_TD)


def _merge(loads: Sequence[ExpertInputs]) -> ExpertInputs:
    if len(loads) == 1:
        return loads[0]
    gate, up, down, selections = zip(*loads, strict=True)
    selection = Selection(*(torch.cat(parts) for parts in zip(*selections, strict=True)))
    return ExpertInputs(torch.cat(gate), torch.cat(up), torch.cat(down), selection)


def _slots(loads: Sequence[ExpertInputs], single_expert_tokens: int) -> tuple[Selection, Tensor]:
    """All slots in a line, each [T], expert after expert, and where each expert's end: int32 [E].

    Lone experts with more room than there are tokens have empty slots taken out; those that must
    stay, for the shape to be known, come last.
    """
    selections = [load.selection for load in loads]
    flat_slot_T = Selection(
        *(torch.cat([p.flatten() for p in parts]) for parts in zip(*selections, strict=True))
    )
    slots = len(flat_slot_T.token_EK)
    lone = sum(each.token_EK.numel() for each in selections if len(each.token_EK) == 1)
    kept = slots - max(0, lone - single_expert_tokens)
    if kept == slots:
        count_E = [torch.ones_like(each.token_EK) for each in selections]
    else:
        order_T = (~flat_slot_T.filled_EK).byte().sort(stable=True).indices[:kept]
        flat_slot_T = Selection(*(part[order_T] for part in flat_slot_T))
        count_E = [each.filled_EK for each in selections]
    end_E = torch.cat([each.sum(1) for each in count_E]).cumsum(0)
    return flat_slot_T, torch.cat((end_E[:-1], end_E.new_full((1,), kept))).int()
