"""Muon (Jordan et al. 2024) for matrices and stacks of matrices that may be sharded."""

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

# The quintic iteration has a steep slope at zero; singular values end up between 0.7 and 1.2.
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5
_MIN_NORM = 1e-7


class Muon(Optimizer):
    """Momentum whose update of each matrix is orthogonalized, as `torch.optim.Muon` does it.

    Beyond that optimizer it accepts stacks of matrices [E, D, F], and sharded parameters. To be
    orthogonalized a matrix has to be whole: matrices of the same shape are stacked, an all-to-all
    in bf16 gives each rank some of them whole, and another one returns its shards to each rank.
    So the work is divided among the ranks, and the momentum stays sharded like the parameter.

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
            params: parameters [rows, columns] or [E, rows, columns], or groups of them.
            lr: learning rate.
            momentum: decay of the mean of the gradient; Nesterov's form is used.
            weight_decay: decoupled weight decay.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients."""
        for group in self.param_groups:
            for parameters in _batches(p for p in group["params"] if p.grad is not None):
                updates = [self._momentum(p, group["momentum"]) for p in parameters]
                for parameter, update in zip(parameters, orthogonalize(updates), strict=True):
                    scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        mean = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(mean, momentum).bfloat16()


def orthogonalize(updates: list[Tensor]) -> list[Tensor]:
    """Set the singular values of every matrix to about 1.

    Args:
        updates: matrices [rows, columns] or stacks [E, rows, columns] of the same shape, bf16,
            sharded alike or not at all.

    Returns:
        Tensors of the same shapes and placements.
    """
    stacks = [update if update.ndim == 3 else update[None] for update in updates]
    sizes = [stack.shape[0] for stack in stacks]
    stack = torch.cat(stacks)
    if isinstance(stack, DTensor):
        whole = [Shard(0) if each.is_shard() else Replicate() for each in stack.placements]
        own = stack.redistribute(placements=whole)
        result: Tensor = DTensor.from_local(
            _newton_schulz(own.to_local()),
            own.device_mesh,
            whole,
            run_check=False,
            shape=own.shape,
            stride=own.stride(),
        ).redistribute(placements=stack.placements)
    else:
        result = _newton_schulz(stack)
    parts = zip(result.split(sizes), updates, strict=True)
    return [part if update.ndim == 3 else part[0] for part, update in parts]


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


def _batches(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group parameters of the same shape, as few as give each rank a matrix."""

    def shape(parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    for _, same in groupby(sorted(parameters, key=shape), shape):
        batch: list[Tensor] = []
        for parameter in same:
            batch.append(parameter)
            ranks = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
            if sum(each.shape[:-2].numel() for each in batch) >= ranks:
                yield batch
                batch = []
        if batch:
            yield batch
