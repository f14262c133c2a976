"""Moving tokens into the slots of experts, and adding the slots' outputs to the tokens.

Each operation is the backward of the other. Scatter-add is the fastest implementation on a CPU. On
a GPU it adds atomically, in an order that changes from run to run; there each token instead looks
up its slots in a table and sums them in the order of the experts, so that results are
deterministic.

Shapes: see `layers.py`; T slots of all experts, C columns of the table: a token has at most one
slot in each.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from moma.model.layers import gather, scatter_add, upcast


class Slots(Protocol):
    """The slots of some experts, each of which holds a token or is empty."""

    def gather(self, x_ND: Tensor) -> Tensor:
        """Return the token in each slot, [T, D]."""

    def scatter_add(self, total_ND: Tensor, z_TD: Tensor) -> Tensor:
        """Add the vector of each slot to its token; those of empty slots have to be zero."""


# Builds slots from the index of the token in each slot [T], whether a slot is filled [T], the
# slot's column [T], the number of tokens and that of columns.
Dispatch = Callable[[Tensor, Tensor, Tensor, int, int], Slots]


class ScatterSlots:
    """Slots whose vectors are added one by one; arguments as of `Dispatch`."""

    def __init__(
        self, index_T: Tensor, filled_T: Tensor, column_T: Tensor, tokens: int, columns: int
    ):
        self.index_T = index_T

    def gather(self, x_ND: Tensor) -> Tensor:
        """See `Slots`."""
        return gather(x_ND, self.index_T)

    def scatter_add(self, total_ND: Tensor, z_TD: Tensor) -> Tensor:
        """See `Slots`."""
        return scatter_add(total_ND, self.index_T, z_TD)


class TableSlots:
    """Slots with a table of the slots of each token; arguments as of `Dispatch`."""

    def __init__(
        self, index_T: Tensor, filled_T: Tensor, column_T: Tensor, tokens: int, columns: int
    ):
        self.index_T = index_T
        # Slots that are empty write to an entry that is cut off; entries without a slot are −1.
        place_T = torch.where(filled_T, index_T * columns + column_T, tokens * columns)
        slot_P = index_T.new_full((tokens * columns + 1,), -1)
        slot_P = slot_P.scatter(0, place_T, torch.arange(len(index_T), device=index_T.device))
        self.slot_NC = slot_P[:-1].view(tokens, columns)

    def gather(self, x_ND: Tensor) -> Tensor:
        """See `Slots`."""
        x_TD: Tensor = _Gather.apply(x_ND, self.index_T, self.slot_NC)
        return x_TD

    def scatter_add(self, total_ND: Tensor, z_TD: Tensor) -> Tensor:
        """See `Slots`."""
        return total_ND + _GatherSum.apply(z_TD, self.index_T, self.slot_NC).to(total_ND.dtype)


def dispatch_for(device: torch.device) -> Dispatch:
    """The fastest implementation that is deterministic on a device."""
    return TableSlots if device.type == "cuda" else ScatterSlots


def _gather_sum(z_TD: Tensor, slot_NC: Tensor) -> Tensor:
    """Sum the vectors of each token's slots in at least fp32.

    All columns are read by one index: compiled by PyTorch 2.11, `_GatherSum` would have wrong
    gradients if it read `z_TD` once for each column.
    """
    if not len(z_TD):  # no token of the modalities
        return upcast(z_TD.new_zeros(len(slot_NC), z_TD.shape[1]))
    z_NCD = torch.where(slot_NC[..., None] >= 0, z_TD[slot_NC.clamp(min=0)], z_TD.new_zeros(()))
    return upcast(z_NCD).sum(1)


class _Gather(torch.autograd.Function):
    """The tokens in all slots; backward sums the gradients of each token's slots."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, index_T: Tensor, slot_NC: Tensor) -> Tensor:
        ctx.save_for_backward(slot_NC)
        return gather(x_ND, index_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slot_NC,), (grad_TD,) = ctx.saved_tensors, grads
        return _gather_sum(grad_TD, slot_NC).to(grad_TD.dtype), None, None


class _GatherSum(torch.autograd.Function):
    """The sum of each token's slots; backward gathers the gradients of the slots' tokens."""

    @staticmethod
    def forward(ctx: Any, z_TD: Tensor, index_T: Tensor, slot_NC: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.dtype = z_TD.dtype
        return _gather_sum(z_TD, slot_NC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index_T,), (grad_ND,) = ctx.saved_tensors, grads
        return gather(grad_ND, index_T).to(ctx.dtype), None, None
