"""One optimizer step: losses by modality, gradients over micro-batches and ranks, update.

Shapes: see `model/layers.py`; M are the modalities.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from moma.data.packing import NO_LABEL, Batch
from moma.model.layers import widen
from moma.model.routing import Routing
from moma.model.transformer import Transformer, require_sound
from moma.runtime.world import World
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
        unsound_L: the layers in which a router's score was NaN or infinite; see `ModelOutput`.
    """

    objective: Tensor
    loss_M: Tensor
    correct_M: Tensor
    targets_M: Tensor
    unsound_L: Tensor | None = None


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
    logits_NV = widen(logits_NV)
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


def next_token_objective(z_loss: float, compiled: bool) -> Objective:
    """Pre-training: cross-entropy of the next token over text and images, with z-loss."""
    sums = torch.compile(cross_entropy_sums, fullgraph=True) if compiled else cross_entropy_sums

    def objective(model: Transformer, batch: DeviceBatch) -> Losses:
        output = model(batch.tokens, batch.documents, batch.positions)
        losses = sums(
            output.logits_BSV.flatten(0, 1),
            batch.labels.flatten(),
            model.modality_of_id,
            z_loss,
            len(model.vocabulary.modalities),
        )
        return losses._replace(unsound_L=output.unsound_L)

    return objective


def router_objective(model: Transformer, batch: DeviceBatch) -> Losses:
    """Auxiliary routers: binary cross-entropy against the batch's real choice (MoMa §2.4).

    A target is one decision of one router: does expert e, or does the layer, take token n.
    """
    output = model(batch.tokens, batch.documents, batch.positions, Routing(record=True))
    dtype = widen(output.logits_BSV).dtype
    modalities = len(model.vocabulary.modalities)
    modality_NM = _one_hot(model.modality_of_id[batch.tokens.flatten()], modalities, dtype)
    loss_M, correct_M, targets_M = modality_NM.new_zeros(3, modalities)
    for chosen_NE, likelihood_NE, eligible_N, _ in output.routers:
        eligible_NM = modality_NM * eligible_N[:, None]
        loss_NE = functional.binary_cross_entropy_with_logits(
            likelihood_NE, chosen_NE, reduction="none"
        )
        loss_M = loss_M + (loss_NE.sum(1)[:, None] * eligible_NM).sum(0)
        right_NE = (likelihood_NE > 0) == (chosen_NE > 0)
        correct_M = correct_M + (right_NE.to(dtype).sum(1)[:, None] * eligible_NM).sum(0)
        targets_M = targets_M + chosen_NE.shape[1] * eligible_NM.sum(0)
    return Losses(loss_M.sum(), loss_M.detach(), correct_M, targets_M, output.unsound_L)


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
    ):
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.clip, self.world = clip, world
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._unsound_L = torch.zeros(len(model.layers), dtype=torch.bool, device=world.device)

    def __call__(self, batches: Sequence[Batch], learning_rate: float) -> tuple[Tensor, Tensor]:
        """Take one step."""
        modalities = len(self.model.vocabulary.modalities)
        sums = torch.zeros(3, modalities, device=self.world.device)
        for batch in batches:
            with self._precision():
                losses = self.objective(self.model, to_device(batch, self.world.device))
            losses.objective.backward()
            self._note(losses.unsound_L)
            sums += torch.stack((losses.loss_M, losses.correct_M, losses.targets_M))
        self.world.sum(sums)
        # Sharding averages gradients over the ranks; the loss is a mean over all their targets.
        scale = self.world.size / sums[2].sum().clamp(min=1)
        for parameter in self.trainable:
            if parameter.grad is None:
                raise RuntimeError("a trainable parameter took no part in the step")
            parameter.grad.mul_(scale)
        norm = nn.utils.clip_grad_norm_(self.trainable, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums, norm

    def require_sound(self, where: str) -> None:
        """Refuse router scores of any step so far that were NaN or infinite, on any rank.

        Reads the device, so it is not asked at every step.

        Raises:
            UserError: naming the layer; `where` opens the message.
        """
        unsound_L = self._unsound_L.float()
        self.world.sum(unsound_L)
        require_sound(unsound_L, where)

    def _note(self, unsound_L: Tensor | None) -> None:
        """Keep the first fault alone: what comes after it in other layers follows from it."""
        if unsound_L is not None:
            self._unsound_L = torch.where(self._unsound_L.any(), self._unsound_L, unsound_L)

    def _precision(self) -> torch.autocast:
        """bf16 products on a GPU that is not sharded; elsewhere the sharding decides."""
        on_gpu = self.world.device.type == "cuda" and self.world.mesh is None
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=on_gpu)


def _one_hot(modality_N: Tensor, modalities: int, dtype: torch.dtype) -> Tensor:
    return functional.one_hot(modality_N, modalities).to(dtype)
