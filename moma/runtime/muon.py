"""Muon (Jordan et al. 2024) for matrices, and stacks of them, that may be sharded by rows."""

import math
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moma.runtime.sharding import local_part

# The quintic iteration has a steep slope at zero; singular values end up between 0.7 and 1.2.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_MIN_NORM = 1e-7


class Muon(Optimizer):
    """Momentum whose update of each matrix is orthogonalized, as `torch.optim.Muon` does it.

    Beyond that optimizer it accepts parameters [E·rows, columns] that stack several matrices, and
    ones that are sharded by rows. To be orthogonalized a matrix has to be whole: an all-to-all in
    bf16 gives each rank some of the matrices of the same shape, and another one returns the shards
    of their updates. So the ranks share the work, and the momentum stays sharded like the
    parameter.

    Updates are scaled by 0.2·sqrt(max(rows, columns)), which gives them the root mean square of
    AdamW's, so that both use the same learning rate and weight decay (Liu et al. 2025, §2.2).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
    ):
        """Create the optimizer.

        Args:
            params: parameters, or groups of them; `matrices` of a group is the number of matrices
                that each of its parameters stacks, by default 1.
            momentum: decay of the mean of the gradient; Nesterov's form is used.
        """
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "matrices": 1}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients."""
        for group in self.param_groups:
            matrices = group["matrices"]
            for parameters in _batches(
                [p for p in group["params"] if p.grad is not None], matrices
            ):
                updates = [self._momentum(p, group["momentum"]) for p in parameters]
                orthogonal = orthogonalize(updates, matrices)
                rows, columns = len(parameters[0]) // matrices, parameters[0].shape[1]
                scale = 0.2 * math.sqrt(max(rows, columns))
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    local_part(parameter).add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum).bfloat16()


def orthogonalize(updates: list[Tensor], matrices: int = 1) -> list[Tensor]:
    """Set the singular values of every matrix to about 1.

    Args:
        updates: tensors [matrices · rows, columns] of the same shape, bf16; either all or none
            sharded by rows.
        matrices: number of matrices that each update stacks.

    Returns:
        This rank's rows of each result.
    """
    own = torch.stack([local_part(update) for update in updates])
    rows, columns = len(updates[0]) // matrices, updates[0].shape[1]
    group = _shard_group(updates[0])
    if group is None:
        result = _newton_schulz(own.view(-1, rows, columns))
    else:
        result = _orthogonalize_shards(
            own.flatten(0, 1), len(updates), len(updates[0]), rows, group
        )
    return list(result.view_as(own))


def _shard_group(tensor: Tensor) -> ProcessGroup | None:
    """The ranks among which the rows of a tensor are divided."""
    if not isinstance(tensor, DTensor):
        return None
    (dimension,) = (n for n, placement in enumerate(tensor.placements) if placement.is_shard())
    return tensor.device_mesh.get_group(dimension)


class _Exchange(NamedTuple):
    """How rows of matrices move between the ranks that hold them and those that compute them.

    Attributes:
        sent: number of rows that this rank sends to each rank.
        received: number of rows that it receives from each.
        place_T: places of the received rows among those that this rank computes.
    """

    sent: list[int]
    received: list[int]
    place_T: Tensor


@cache  # a copy to the device in every step would wait for it
def plan_exchange(
    updates: int, length: int, rows: int, rank: int, ranks: int, device: torch.device
) -> _Exchange:
    """Plan the exchange of a number of updates of a length; see `_orthogonalize_shards`."""
    row_of = torch.arange(updates * length).view(updates, length)
    size = -(-length // ranks)  # rows of an update that a rank holds
    held = [row_of[:, each * size : (each + 1) * size].flatten() for each in range(ranks)]
    computed = -(-(updates * length // rows) // ranks) * rows  # rows that a rank computes
    counts = [torch.bincount(row_T // computed, minlength=ranks).tolist() for row_T in held]
    row_T = torch.cat(held)
    place_T = (row_T[row_T // computed == rank] - rank * computed).to(device)
    return _Exchange(counts[rank], [count[rank] for count in counts], place_T)


def _orthogonalize_shards(
    own: Tensor, updates: int, length: int, rows: int, group: ProcessGroup
) -> Tensor:
    """Orthogonalize matrices of which each rank holds some rows; each rank computes some of them.

    Args:
        own: this rank's rows, [T, columns].
        updates: number of updates, of each of which a rank holds an equal part.
        length: rows of an update.
        rows: rows of a matrix.
    """
    plan = plan_exchange(updates, length, rows, group.rank(), group.size(), own.device)
    arrived = own.new_empty(len(plan.place_T), own.shape[1])
    distributed.all_to_all_single(arrived, own, plan.received, plan.sent, group)
    whole = torch.empty_like(arrived).index_copy_(0, plan.place_T, arrived)
    whole = _newton_schulz(whole.view(-1, rows, own.shape[1])).flatten(0, 1)
    returned = torch.empty_like(own)
    distributed.all_to_all_single(returned, whole[plan.place_T], plan.sent, plan.received, group)
    return returned


def _newton_schulz(matrices: Tensor) -> Tensor:
    """Newton-Schulz iterations on [batch, rows, columns]."""
    a, b, c = _COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_MIN_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).contiguous()


def _batches(parameters: Iterable[Tensor], matrices: int) -> Iterator[list[Tensor]]:
    """Group parameters of the same shape, as few as give each rank a matrix."""

    def shape(parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    for _, group in groupby(sorted(parameters, key=shape), shape):
        same = list(group)
        ranks = _shard_group(same[0])
        size = -(-(ranks.size() if ranks else 1) // matrices)
        yield from (same[start : start + size] for start in range(0, len(same), size))
