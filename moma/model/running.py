"""Running experts on the tokens they took: three strategies, one result (MoMa §3).

    tokens gathered → products of the experts → times the weights, added back where they came from

- `sequential`: group after group, so that each may be a shard unit of its own: the next one's
  weights arrive while one computes. The paper's choice.
- `batched`: groups of equal capacity in one batched product. Their weights are put side by side.
- `grouped`: all experts in one product of unequal parts, one gather and one scatter. Slots that
  are known to hold no token are left out.

Shapes: see `layers.py`; T are the slots of all experts together, E in `grouped` all experts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moma.model.grouped import grouped_product
from moma.model.layers import add_rows_, take_rows
from moma.model.routing import Selection

RunName = Literal["sequential", "batched", "grouped"]


class Load(NamedTuple):
    """The experts of a group and what they have to do.

    Attributes:
        gate_EDF, up_EDF, down_EFD: their weights.
        selection: the tokens that they took, [E, K].
    """

    gate_EDF: Tensor
    up_EDF: Tensor
    down_EFD: Tensor
    selection: Selection


Strategy = Callable[[Tensor, Sequence[Load]], Tensor]


def joint_strategy(name: RunName, lone_overlap: int) -> Strategy:
    """The function of `batched` or `grouped`; see `run_grouped` for `lone_overlap`."""
    return run_batched if name == "batched" else partial(run_grouped, lone_overlap=lone_overlap)


def run_sequential(x_ND: Tensor, loads: Sequence[Load]) -> Tensor:
    """Load after load, each expert's slots in one batched product; [N, D] to [N, D]."""
    y_ND = _nothing(x_ND)
    for load in loads:
        token_EK, _, weight_EK = load.selection
        token_T = token_EK.flatten()
        x_EKD = take_rows(x_ND, token_T).unflatten(0, token_EK.shape)
        hidden_EKF = functional.silu(x_EKD @ load.gate_EDF) * (x_EKD @ load.up_EDF)
        y_EKD = (hidden_EKF @ load.down_EFD) * weight_EK[..., None]
        add_rows_(y_ND, token_T, y_EKD.flatten(0, 1))
    return y_ND.to(x_ND.dtype)


def run_batched(x_ND: Tensor, loads: Sequence[Load]) -> Tensor:
    """Loads of equal capacity as one; [N, D] to [N, D]."""
    alike: dict[int, list[Load]] = {}
    for load in loads:
        alike.setdefault(load.selection.token_EK.shape[1], []).append(load)
    return run_sequential(x_ND, [_merge(each) for each in alike.values()])


def run_grouped(x_ND: Tensor, loads: Sequence[Load], lone_overlap: int) -> Tensor:
    """All experts in one grouped product; [N, D] to [N, D].

    Args:
        x_ND: tokens.
        loads: may differ in experts and in capacity.
        lone_overlap: how many of the groups of one expert can take the same token. Such groups
            together hold at most that many times N tokens, whatever their capacities say.
    """
    gate, up, down, _ = zip(*loads, strict=True)
    (token_T, _, weight_T), end_E = _slots(loads, lone_overlap * len(x_ND))
    x_TD = take_rows(x_ND, token_T)
    gate_TF, up_TF = (grouped_product(x_TD, part, end_E) for part in (gate, up))
    y_TD = grouped_product(functional.silu(gate_TF) * up_TF, down, end_E) * weight_T[:, None]
    return add_rows_(_nothing(x_ND), token_T, y_TD).to(x_ND.dtype)


def _nothing(x_ND: Tensor) -> Tensor:
    """Zeros to add weighted outputs to, in the precision of the weights: at least fp32."""
    return torch.zeros_like(x_ND, dtype=torch.promote_types(x_ND.dtype, torch.float32))


def _merge(loads: Sequence[Load]) -> Load:
    if len(loads) == 1:
        return loads[0]
    gate, up, down, selections = zip(*loads, strict=True)
    selection = Selection(*(torch.cat(parts) for parts in zip(*selections, strict=True)))
    return Load(torch.cat(gate), torch.cat(up), torch.cat(down), selection)


def _slots(loads: Sequence[Load], lone_tokens: int) -> tuple[Selection, Tensor]:
    """All slots in a line, each [T], expert after expert, and where each expert's end: int32 [E].

    Lone experts with more room than there are tokens have empty slots taken out; those that must
    stay, for the shape to be known, come last.
    """
    selections = [load.selection for load in loads]
    line_T = Selection(
        *(torch.cat([p.flatten() for p in parts]) for parts in zip(*selections, strict=True))
    )
    slots = len(line_T.token_EK)
    lone = sum(each.token_EK.numel() for each in selections if len(each.token_EK) == 1)
    kept = slots - max(0, lone - lone_tokens)
    if kept == slots:
        count_E = [torch.ones_like(each.token_EK) for each in selections]
    else:
        order_T = (~line_T.taken_EK).byte().sort(stable=True).indices[:kept]
        line_T = Selection(*(part[order_T] for part in line_T))
        count_E = [each.taken_EK for each in selections]
    end_E = torch.cat([each.sum(1) for each in count_E]).cumsum(0)
    return line_T, torch.cat((end_E[:-1], end_E.new_full((1,), kept))).int()
