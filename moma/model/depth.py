"""Mixture-of-depths: some layers process only some tokens (MoMa §2.3, Equation 2).

    ĝ(x) = sigmoid(x · ŵ);   the k_d highest-scored tokens:  x + ĝ(x) · update(x);   others:  x

The depth router acts before the split by modality ("staged"): the selected tokens of all
modalities pass through attention and experts, attending only to each other. All other tokens are
left unchanged, bit for bit.

Shapes: see `layers.py`; R sequences of K selected tokens each: one for the whole micro-batch, or
one per sequence of it.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moma.model.routers import (
    AuxiliaryRouter,
    Diagnostics,
    Router,
    auxiliary_logits,
    diagnose,
    select_slots,
)
from moma.model.routing import (
    BatchChoice,
    CapacityName,
    Routing,
    Scores,
    Selection,
    logistic_noise,
    router_logits,
    select_by_sequence,
    static_capacity,
)
from moma.recipe import Config


class DepthConfig(Config):
    """Which layers use mixture-of-depths, and how many tokens they process.

    Attributes:
        capacity_factor: fraction c_d of the tokens that such a layer processes.
        layers: layer numbers, from 0; if omitted, every second layer from the first (§4.1).
        scope: tokens compete within the whole micro-batch (`batch`, §2.3) or within their
            `sequence` (Raposo et al. 2024, arXiv 2404.02258).
        noise: whether the depth routers' logits get Gumbel-Sigmoid noise in training (Equation 5),
            so that the model meets other decisions than those of the batch.
    """

    capacity_factor: float = Field(0.25, gt=0, le=1)
    layers: tuple[int, ...] | None = None
    scope: Literal["batch", "sequence"] = "batch"
    noise: bool = False


class DepthRouter(nn.Module):
    """Selects the tokens that a layer processes (Equations 2 and 4)."""

    def __init__(self, dim: int, config: DepthConfig):
        super().__init__()
        self.capacity_factor, self.scope = config.capacity_factor, config.scope
        self.noise = config.noise
        self.router = Router(dim, 1)
        self.auxiliary = AuxiliaryRouter(dim, 1)

    def forward(
        self,
        x_BSD: Tensor,
        eligible_BS: Tensor,
        routing: Routing,
        segment_BS: Tensor | None = None,
    ) -> tuple[Selection, Diagnostics]:
        """Select tokens of [B, S, D].

        Args:
            x_BSD: tokens.
            eligible_BS: false for padding, which is never selected.
            routing: static capacity is c_d · N slots, actual capacity c_d times the non-padding
                tokens (by sequence, always c_d · S slots per sequence).
            segment_BS: segments of attention, needed by thresholds with slots; see `Segments`.

        Returns:
            The selection [R, K], its tokens in batch order, and diagnostics.
        """
        policy = routing.depth
        x_ND = x_BSD.flatten(0, 1)
        logits_N1 = router_logits(self.router.weight, x_ND)
        auxiliary_N1 = auxiliary_logits(self.auxiliary, x_ND, policy, routing)
        rows = len(x_BSD) if self.scope == "sequence" else 1
        logits_RN, eligible_RN = (x.reshape(rows, -1) for x in (logits_N1, eligible_BS))
        auxiliary_RN = None if auxiliary_N1 is None else auxiliary_N1.reshape(rows, -1)
        threshold_11 = self.router.threshold_E[:, None]
        slots = partial(self._slots, eligible_RN)
        scores, clean_RN = Scores(logits_RN, eligible_RN, auxiliary_RN, threshold_11, slots), None
        if self.noise and self.training and isinstance(policy, BatchChoice):
            clean_RN = logits_RN
            scores = scores._replace(logits_RN=logits_RN + logistic_noise(logits_RN))
        if policy.capacity is None:
            selected_BS = policy.candidates(scores).view_as(eligible_BS)
            selection = select_by_sequence(selected_BS, logits_N1.view_as(eligible_BS))
            cutoff_1, excess = None, None
        else:
            selection, cutoff_R, excess = select_slots(policy, scores, clean_RN)
            length, order_BS = logits_RN.shape[1], None if excess is None else segment_BS
            selection, cutoff_1 = (
                _in_batch_order(selection, length, order_BS),
                cutoff_R.mean(0, True),
            )
        selected_N1 = None
        if routing.records:
            flat = Selection(*(part_RK.flatten()[None] for part_RK in selection))
            selected_N1 = flat.selected_NE(len(x_ND))
        return selection, diagnose(
            selected_N1,
            logits_N1,
            auxiliary_N1,
            eligible_BS.flatten(),
            routing,
            "depth",
            cutoff_1,
            excess,
        )

    def _slots(self, eligible_RN: Tensor, capacity: CapacityName) -> int:
        tokens = eligible_RN.shape[1]
        if capacity == "actual" and self.scope == "batch":
            tokens = int(eligible_RN.sum())
        return static_capacity(self.capacity_factor, tokens)


def _in_batch_order(selection: Selection, length: int, segment_BS: Tensor | None) -> Selection:
    """Sort the tokens of rows of a given length, and number them over all rows.

    Given segments, empty slots follow the tokens of their segment, which do not attend to them.
    """
    index_RK = selection.index_EK
    first_R1 = torch.arange(len(index_RK), device=index_RK.device)[:, None] * length
    key_RK = index_RK + first_R1
    if segment_BS is not None:
        part_RK = 2 * segment_BS.flatten()[key_RK] + ~selection.filled_EK
        key_RK = part_RK * segment_BS.numel() + key_RK
    order_RK = key_RK.argsort(dim=1)
    return Selection(
        index_RK.gather(1, order_RK) + first_R1,
        selection.filled_EK.gather(1, order_RK),
        selection.score_EK.gather(1, order_RK),
    )
