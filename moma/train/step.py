"""One optimizer step: losses by modality, gradients over micro-batches and ranks, update.

Shapes: see `model/layers.py`; M are the modalities.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim import Optimizer

from moma.data.batches.packing import NO_LABEL, Batch
from moma.model.layers import upcast
from moma.model.routers import RouterRecord
from moma.model.routing import Routing
from moma.model.transformer import Transformer
from moma.runtime.world import World
from moma.train.statistics import Statistics
from moma.train.watch import LossMonitor
from moma.vocabulary import MODALITIES


class DeviceBatch(NamedTuple):
    """A micro-batch on the device, int64, each [B, S]; see `data.packing.Batch`."""

    tokens: Tensor
    labels: Tensor
    documents: Tensor
    positions: Tensor


class Losses(NamedTuple):
    """Sums over a micro-batch, to be divided by the number of targets.

    Attributes:
        objective: what is minimised, a differentiable sum.
        loss_M, correct_M, targets_M: loss, right answers and targets of each modality.
        nonfinite_L: the layers whose output or router's score is NaN or infinite; see
        `ModelOutput`.
        routers: what the routers did.
    """

    objective: Tensor
    loss_M: Tensor
    correct_M: Tensor
    targets_M: Tensor
    nonfinite_L: Tensor | None = None
    routers: Sequence[RouterRecord] = ()


Objective = Callable[[Transformer, DeviceBatch], Losses]


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copy a batch to the device."""
    arrays = (batch.tokens_BS, batch.labels_BS, batch.documents_BS, batch.positions_BS)
    return DeviceBatch(
        *(torch.from_numpy(array).long().to(device, non_blocking=True) for array in arrays)
    )


def cross_entropy_sums(
    logits_NV: Tensor,
    labels_N: Tensor,
    modality_of_id: Tensor,
    z_loss: float,
    modalities: int = len(MODALITIES),
) -> Losses:
    """Next-token cross-entropy in nats by the modality of the target, ignored labels left out."""
    logits_NV = upcast(logits_NV)
    target_N = labels_N.clamp(min=0)
    counted_N = (labels_N != NO_LABEL).to(logits_NV.dtype)
    normaliser_N = logits_NV.logsumexp(-1)
    picked_N = logits_NV.gather(1, target_N[:, None]).squeeze(1)
    loss_N = (normaliser_N - picked_N) * counted_N
    objective = (loss_N + z_loss * normaliser_N.square() * counted_N).sum()
    of_modality_NM = _one_hot(modality_of_id[target_N], modalities, logits_NV.dtype)
    of_modality_NM = of_modality_NM * counted_N[:, None]
    correct_N = (logits_NV.detach().argmax(-1) == target_N).to(logits_NV.dtype)
    return Losses(
        objective,
        (loss_N.detach()[:, None] * of_modality_NM).sum(0),
        (correct_N[:, None] * of_modality_NM).sum(0),
        of_modality_NM.sum(0),
    )


def next_token_objective(z_loss: float, compiled: bool, choices: bool = True) -> Objective:
    """Pre-training: cross-entropy of the next token over text and images, with z-loss.

    Args:
        z_loss: its weight.
        compiled: whether the loss runs as a compiled graph.
        choices: whether routers tell what they chose, which rows of the log need.
    """
    sums = torch.compile(cross_entropy_sums, fullgraph=True) if compiled else cross_entropy_sums

    def objective(model: Transformer, batch: DeviceBatch) -> Losses:
        output = model(
            batch.tokens, batch.documents, batch.positions, Routing(record_selection=choices)
        )
        losses = sums(
            output.logits_BSV.flatten(0, 1),
            batch.labels.flatten(),
            model.modality_of_id,
            z_loss,
            len(model.vocabulary.modalities),
        )
        return losses._replace(nonfinite_L=output.nonfinite_L, routers=output.routers)

    return objective


def router_objective(model: Transformer, batch: DeviceBatch) -> Losses:
    """Auxiliary routers: binary cross-entropy against the batch's real choice (MoMa §2.4).

    A target is one decision of one router: does expert e, or does the layer, take token n.
    """
    output = model(batch.tokens, batch.documents, batch.positions, Routing(record_auxiliary=True))
    dtype = upcast(output.logits_BSV).dtype
    modalities = len(model.vocabulary.modalities)
    modality_NM = _one_hot(model.modality_of_id[batch.tokens.flatten()], modalities, dtype)
    loss_M, correct_M, targets_M = modality_NM.new_zeros(3, modalities)
    for selected_NE, auxiliary_logits_NE, eligible_N, *_ in output.routers:
        eligible_NM = modality_NM * eligible_N[:, None]
        assert auxiliary_logits_NE is not None
        loss_NE = functional.binary_cross_entropy_with_logits(
            auxiliary_logits_NE, selected_NE, reduction="none"
        )
        loss_M = loss_M + (loss_NE.sum(1)[:, None] * eligible_NM).sum(0)
        right_NE = (auxiliary_logits_NE > 0) == (selected_NE > 0)
        correct_M = correct_M + (right_NE.to(dtype).sum(1)[:, None] * eligible_NM).sum(0)
        targets_M = targets_M + selected_NE.shape[1] * eligible_NM.sum(0)
    return Losses(
        loss_M.sum(), loss_M.detach(), correct_M, targets_M, output.nonfinite_L, output.routers
    )


class Step:
    """An optimizer step with the gradient of the mean over all targets of all ranks.

    Call it with the step's micro-batches; it returns the sums [3, M] of loss, right answers and
    targets over all ranks, and the norm of the gradient, all left on the device.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizer,
        objective: Objective,
        clip: float,
        world: World,
        watch: LossMonitor | None = None,
        precision: torch.dtype | None = None,
    ):
        """Set up.

        Args:
            model: to be trained, sharded or whole.
            optimizer: its groups have a `rate`.
            objective: what the stage minimises.
            clip: largest norm of the gradient.
            world: the ranks.
            watch: judges each step, and may have it skipped.
            precision: what an unsharded model computes products in; left out, bf16 on a GPU.
                Elsewhere the sharding decides.
        """
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.clip, self.world, self.watch = clip, world, watch
        on_gpu = world.device.type == "cuda"
        self._low = precision == torch.bfloat16 if precision else on_gpu
        self.trainable = [p for p in model.parameters() if p.requires_grad]

    def __call__(
        self,
        batches: Sequence[Batch],
        learning_rate: float,
        statistics: Statistics | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Take one step; `statistics`, if given, sees its last micro-batch and its gradients."""
        sums, nonfinite_L = self._over_ranks(*self._backward(batches, statistics))
        # Sharding averages gradients over the ranks; the loss is a mean over all their targets.
        scale = self.world.size / sums[2].sum().clamp(min=1)
        for parameter in self.trainable:
            if parameter.grad is None:
                raise RuntimeError(f"{self._name(parameter)}: took no part in the step")
            parameter.grad.mul_(scale)
        if statistics is not None:
            statistics.see_gradients()
        norm = self._clip()
        if self.watch is not None:
            loss = sums[0].sum() / sums[2].sum().clamp(min=1)
            sound = self.watch.judge(loss, norm, nonfinite_L)
            if self.watch.refuses(sound):
                if statistics is not None:
                    statistics.sums.clear()
                self.optimizer.zero_grad(set_to_none=True)
                return torch.zeros_like(sums), torch.zeros_like(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums, norm

    def _backward(
        self, batches: Sequence[Batch], statistics: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        """Add up gradients; returns this rank's sums and the first batch's non-finite layers."""
        sums = torch.zeros(3, len(self.model.vocabulary.modalities), device=self.world.device)
        nonfinite_L = sums.new_zeros(len(self.model.layers), dtype=torch.bool)
        for index, batch in enumerate(batches):
            on_device = to_device(batch, self.world.device)
            with self.precision():
                losses = self.objective(self.model, on_device)
            losses.objective.backward()
            if losses.nonfinite_L is not None:
                nonfinite_L = torch.where(nonfinite_L.any(), nonfinite_L, losses.nonfinite_L)
            if statistics is not None and index == len(batches) - 1:
                statistics.see_routers(losses.routers, on_device.tokens)
            sums += torch.stack((losses.loss_M, losses.correct_M, losses.targets_M))
        return sums, nonfinite_L

    def _over_ranks(self, sums: Tensor, nonfinite_L: Tensor) -> tuple[Tensor, Tensor]:
        """Both of all ranks, in one reduction."""
        both = self.world.sum(torch.cat((sums.flatten(), nonfinite_L.to(sums.dtype))))
        return both[: sums.numel()].view_as(sums), both[sums.numel() :] > 0

    def _name(self, parameter: nn.Parameter) -> str:
        return next(name for name, each in self.model.named_parameters() if each is parameter)

    def _clip(self) -> Tensor:
        """Shorten the gradient to the largest norm; returns the norm it had."""
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(self.trainable, self.clip, norm)
        return norm

    def precision(self) -> torch.autocast:
        """bf16 products where they are wanted and sharding does not see to it."""
        enabled = self._low and self.world.mesh is None
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)


def _one_hot(modality_N: Tensor, modalities: int, dtype: torch.dtype) -> Tensor:
    return functional.one_hot(modality_N, modalities).to(dtype)
