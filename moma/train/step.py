"""One optimizer step: losses by modality, gradients over micro-batches and ranks, update.

Shapes: see `model/layers.py`; M modalities.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.optim import Optimizer

from moma.data.batches.packing import NO_LABEL, Batch
from moma.model.layers import upcast
from moma.model.routers import RouterRecord, finite_cutoffs
from moma.model.routing import Routing
from moma.model.transformer import Head, ModelOutput, Transformer, no_head
from moma.runtime.sharding import local_part
from moma.runtime.world import World
from moma.train.cross_entropy import TokenLosses, cross_entropy_chunk, linear_cross_entropy
from moma.train.monitor import LossMonitor
from moma.train.statistics import Statistics


class DeviceBatch(NamedTuple):
    """A micro-batch on the device.

    Attributes:
        tokens_BS, labels_BS, document_ids_BS, positions_BS: as in `data.batches.packing.Batch`.
        max_documents: upper bound of the number of pieces of documents, runs of padding included.
        max_length: upper bound of the length of such a piece.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    document_ids_BS: Tensor
    positions_BS: Tensor
    max_documents: int | None = None
    max_length: int | None = None


class LossOutput(NamedTuple):
    """Result of a loss function for a micro-batch.

    Attributes:
        objective: the differentiable sum over targets that is minimized, z-loss and the losses of
            routers included.
        loss_M: sum of the cross-entropies in nats, without z-loss, by the modality of the target,
            or in `router_loss` of the input token.
        correct_M: number of correct predictions, by the same modality.
        targets_M: number of targets (labels, or decisions of routers), by the same modality.
        nonfinite_L, routers, cutoffs, loads: as in `ModelOutput`.
    """

    objective: Tensor
    loss_M: Tensor
    correct_M: Tensor
    targets_M: Tensor
    nonfinite_L: Tensor
    routers: Sequence[RouterRecord]
    cutoffs: Sequence[Tensor]
    loads: Sequence[Tensor]


LossFunction = Callable[[Transformer, DeviceBatch], LossOutput]


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Copy a micro-batch to the device; a GPU does so without making the host wait."""
    arrays = (batch.tokens_BS, batch.labels_BS, batch.document_ids_BS, batch.positions_BS)
    host_4BS = torch.from_numpy(np.stack(arrays))
    if device.type == "cuda":
        host_4BS = host_4BS.pin_memory()
    tokens_BS, labels_BS, document_ids_BS, positions_BS = host_4BS.to(device, non_blocking=True)
    starts_BS = np.ones_like(batch.document_ids_BS, dtype=bool)
    starts_BS[:, 1:] = batch.document_ids_BS[:, 1:] != batch.document_ids_BS[:, :-1]
    lengths = np.diff(np.flatnonzero(starts_BS), append=starts_BS.size)
    bounds = _power_of_two(len(lengths), 16), _power_of_two(int(lengths.max()), 128)
    return DeviceBatch(tokens_BS, labels_BS, document_ids_BS, positions_BS, *bounds)


def _power_of_two(number: int, least: int) -> int:
    """A power of two of at least both numbers, so that compiled layers see few different bounds."""
    return 1 << (max(number, least) - 1).bit_length()


def run_model(
    model: Transformer, batch: DeviceBatch, routing: Routing, head: Head = functional.linear
) -> ModelOutput:
    """Run the model's forward pass on a micro-batch; see `Transformer.forward`."""
    return model(
        batch.tokens_BS,
        batch.document_ids_BS,
        batch.positions_BS,
        routing,
        head,
        batch.max_documents,
        batch.max_length,
    )


def sum_by_modality(
    losses: TokenLosses, labels_N: Tensor, modality_of_id: Tensor, modalities: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the losses of tokens by the modality of their labels.

    Args:
        labels_N: targets, `NO_LABEL` where there is none.
        modality_of_id: modality of each id, [V].
        modalities: number of modalities M.

    Returns:
        Losses, correct predictions and targets; see `LossOutput`.
    """
    modality_NM = _one_hot(modality_of_id[labels_N.clamp(min=0)], modalities, losses.loss_N.dtype)
    modality_NM = modality_NM * (labels_N != NO_LABEL)[:, None]
    # Sums, since autocast would compute a matrix product in bf16.
    summed = (losses.loss_N, losses.correct_N)
    loss_M, correct_M = ((x_N[:, None] * modality_NM).sum(0) for x_N in summed)
    return loss_M, correct_M, modality_NM.sum(0)


def next_token_loss(
    z_loss: float = 0.0,
    compiled: bool = False,
    routing: Routing = Routing(record_selection=True),  # noqa: B008  frozen
) -> LossFunction:
    """Pre-training: next-token cross-entropy over text and images, with z-loss.

    Args:
        z_loss: weight of (log Z)² (Chameleon, arXiv 2405.09818 §2.3).
        compiled: whether to compile the loss of a chunk of tokens.
        routing: how tokens are routed; log records need the routers' selections. With
            `record_auxiliary`, the mean loss of the auxiliary routers is added; see `router_loss`.
    """
    chunk = cross_entropy_chunk
    if compiled:
        chunk = torch.compile(chunk, fullgraph=True, dynamic=False)

    def loss_function(model: Transformer, batch: DeviceBatch) -> LossOutput:
        labels_N = batch.labels_BS.flatten()

        def head(hidden_BSD: Tensor, weight_VD: Tensor) -> tuple[Tensor, TokenLosses]:
            hidden_ND = hidden_BSD.flatten(0, 1)
            return linear_cross_entropy(hidden_ND, weight_VD, labels_N, z_loss, chunk)

        output = run_model(model, batch, routing, head)
        objective, losses = output.head
        modalities = len(model.vocabulary.modalities)
        sums = sum_by_modality(losses, labels_N, model.modality_of_id, modalities)
        if output.router_loss is not None:
            objective = objective + output.router_loss * sums[2].sum()
        if routing.record_auxiliary:
            loss_M, _, decisions_M = _auxiliary_losses(model, batch, output.routers)
            objective = objective + loss_M.sum() / decisions_M.sum() * sums[2].sum()
        return LossOutput(
            objective, *sums, output.nonfinite_L, output.routers, output.cutoffs, output.loads
        )

    return loss_function


def router_loss(model: Transformer, batch: DeviceBatch) -> LossOutput:
    """Auxiliary routers: binary cross-entropy against the main routers' selections (MoMa §2.4).

    A target is one decision of one router: whether expert e, or the layer, processes token n.
    """
    output = run_model(model, batch, Routing(record_auxiliary=True), no_head)
    loss_M, correct_M, targets_M = _auxiliary_losses(model, batch, output.routers)
    return LossOutput(
        loss_M.sum(),
        loss_M.detach(),
        correct_M,
        targets_M,
        output.nonfinite_L,
        output.routers,
        output.cutoffs,
        output.loads,
    )


def _auxiliary_losses(
    model: Transformer, batch: DeviceBatch, records: Sequence[RouterRecord]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of losses, correct decisions and decisions of auxiliary routers, each [M]."""
    dtype = upcast(model.embedding.weight).dtype
    modalities = len(model.vocabulary.modalities)
    modality_NM = _one_hot(model.modality_of_id[batch.tokens_BS.flatten()], modalities, dtype)
    loss_M, correct_M, targets_M = modality_NM.new_zeros(3, modalities)
    for record in records:
        selected_NE, auxiliary_logits_NE = record.selected_NE, record.auxiliary_logits_NE
        if auxiliary_logits_NE is None:  # token choice has none
            continue
        eligible_NM = modality_NM * record.eligible_N[:, None]
        loss_NE = functional.binary_cross_entropy_with_logits(
            auxiliary_logits_NE, selected_NE, reduction="none"
        )
        loss_M = loss_M + (loss_NE.sum(1)[:, None] * eligible_NM).sum(0)
        correct_NE = (auxiliary_logits_NE > 0) == (selected_NE > 0)
        correct_M = correct_M + (correct_NE.to(dtype).sum(1)[:, None] * eligible_NM).sum(0)
        targets_M = targets_M + selected_NE.shape[1] * eligible_NM.sum(0)
    return loss_M, correct_M, targets_M


class Step:
    """One optimizer step on the mean loss over all targets of all ranks."""

    def __init__(
        self,
        model: Transformer,
        optimizers: Sequence[Optimizer],
        loss_function: LossFunction,
        max_norm: float,
        world: World,
        monitor: LossMonitor | None = None,
        compute_dtype: torch.dtype | None = None,
        reduces_once: bool = True,
        threshold_loss: LossFunction | None = None,
    ):
        """Create the step.

        Args:
            model: the model, sharded or not.
            optimizers: their parameter groups have an `lr_scale`.
            loss_function: computes what the stage minimizes.
            max_norm: the gradient is scaled down to this norm if it exceeds it.
            monitor: checks each step, and may skip it.
            compute_dtype: of an unsharded model's matrix products; by default bf16 on a GPU.
            reduces_once: whether the gradients of a sharded model are summed over ranks after the
                last micro-batch only.
            threshold_loss: computes what steps that route by thresholds minimize; by default
                `loss_function`.
        """
        self.model, self.loss_function = model, loss_function
        self.threshold_loss = threshold_loss or loss_function
        self.optimizers = tuple(optimizers)
        self.max_norm, self.world, self.monitor = max_norm, world, monitor
        # Whose gradients are reduced over ranks once per step; None: after each micro-batch.
        self._reduced_once = model if reduces_once and isinstance(model, FSDPModule) else None
        self._max_documents = self._max_length = 0
        on_gpu = world.device.type == "cuda"
        self._is_bf16 = compute_dtype == torch.bfloat16 if compute_dtype else on_gpu
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def __call__(
        self,
        batches: Sequence[Batch],
        learning_rate: float,
        statistics: Statistics | None = None,
        by_threshold: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            batches: the step's micro-batches on this rank.
            learning_rate: of parameter groups whose `lr_scale` is 1.
            statistics: gets the routers of the last micro-batch, and the gradients.
            by_threshold: whether the step routes by thresholds; see
                `StageConfig.routes_by_threshold`.

        Returns:
            Sums [3, M] over all ranks of losses, correct predictions and targets, and the norm of
            the gradient before clipping; both stay on the device. Zeros if the step is skipped.

        Raises:
            UserError: too many consecutive steps were skipped.
            RuntimeError: a trainable parameter took no part in the step.
        """
        sums, nonfinite_L, cutoffs_2P, load_O = self._accumulate_gradients(
            batches, statistics, self.threshold_loss if by_threshold else self.loss_function
        )
        targets = sums[2].sum().clamp(min=1)
        # FSDP averages gradients over ranks; the loss is a mean over the targets of all ranks.
        scale = self.world.size / targets
        gradients = []
        for name, parameter in self.trainable.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name}: took no part in the step")
            gradients.append(local_part(parameter.grad))
        torch._foreach_mul_(gradients, scale)
        if statistics is not None:
            statistics.add_gradients()
        norm = self._clip_gradient()
        if self.monitor is not None:
            ok = self.monitor.check(sums[0].sum() / targets, norm, nonfinite_L)
            if self.monitor.should_skip(ok):
                if statistics is not None:
                    statistics.sums.clear()
                self.model.zero_grad()
                return torch.zeros_like(sums), torch.zeros_like(norm)
        if self.model.training:  # not while the model is frozen
            self.model.update_cutoffs(cutoffs_2P / (len(batches) * self.world.size))
            self.model.update_biases(load_O)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]
            optimizer.step()
        self.model.zero_grad()
        return sums, norm

    def autocast(self) -> torch.autocast:
        """The autocast context of an unsharded model's forward pass."""
        enabled = self._is_bf16 and self.world.mesh is None
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled)

    def _accumulate_gradients(
        self,
        batches: Sequence[Batch],
        statistics: Statistics | None,
        loss_function: LossFunction,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run forward and backward of all micro-batches.

        Returns:
            sums [3, M] over all ranks; see `__call__`.
            nonfinite_L: whether a layer was non-finite on some rank; of each rank, only its first
                micro-batch with a non-finite layer counts.
            cutoffs_2P: of each of the P cutoffs of all routers, the sum of the finite ones and how
                many were finite, over micro-batches and ranks.
            load_O: the loads of the O outputs of all token-choice routers, summed likewise.
        """
        sums = torch.zeros(3, len(self.model.vocabulary.modalities), device=self.world.device)
        nonfinite_L = sums.new_zeros(len(self.model.layers), dtype=torch.bool)
        cutoffs: list[Tensor] = []
        loads: list[Tensor] = []
        on_device = [to_device(batch, self.world.device) for batch in batches]
        for batch in on_device:
            # Bounds only grow: a new value recompiles the layers.
            self._max_documents = max(self._max_documents, batch.max_documents or 0)
            self._max_length = max(self._max_length, batch.max_length or 0)
        for number, batch in enumerate(on_device, 1):
            if self._reduced_once is not None:
                self._reduced_once.set_requires_gradient_sync(number == len(batches))
            with self.autocast():
                bounded = batch._replace(
                    max_documents=self._max_documents, max_length=self._max_length
                )
                losses = loss_function(self.model, bounded)
            losses.objective.backward()
            nonfinite_L = torch.where(nonfinite_L.any(), nonfinite_L, losses.nonfinite_L)
            sums += torch.stack((losses.loss_M, losses.correct_M, losses.targets_M))
            cutoffs.append(finite_cutoffs([sums.new_zeros(0), *losses.cutoffs]))
            loads.append(torch.cat([sums.new_zeros(0), *losses.loads]))
        if statistics is not None:
            statistics.add_routers(losses.routers, batch.tokens_BS)
        counts = torch.stack(cutoffs).sum(0), torch.stack(loads).sum(0)
        parts = sums, nonfinite_L.to(sums.dtype), *counts
        sums, nonfinite_L, cutoffs_2P, load_O = self.world.sum_each(parts)
        return sums, nonfinite_L > 0, cutoffs_2P, load_O

    def _clip_gradient(self) -> Tensor:
        """Scale the gradient down to `max_norm`; returns its norm before."""
        parameters = list(self.trainable.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return norm


def _one_hot(modality_N: Tensor, modalities: int, dtype: torch.dtype) -> Tensor:
    return functional.one_hot(modality_N, modalities).to(dtype)
