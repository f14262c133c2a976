"""Mixture-of-depths: some layers process only some tokens (MoMa §2.3, Equation 2).

    ĝ(x) = sigmoid(x · ŵ);   the k_d highest-scored tokens:  x + ĝ(x) · update(x);   others:  x

The depth router acts before the split by modality ("staged"): the selected tokens of all
modalities pass through attention and experts, attending only to each other. All other tokens are
left unchanged, bit for bit.

Shapes: see `layers.py`; R sequences of K selected tokens each: one for the whole micro-batch, or
one per sequence of it.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moma.model.routers import AuxiliaryRouter, Diagnostics, auxiliary_logits, diagnose
from moma.model.routing import (
    Routing,
    Selection,
    causal_choice,
    router_logits,
    select_by_sequence,
    select_top_k,
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
    """

    capacity_factor: float = Field(0.25, gt=0, le=1)
    layers: tuple[int, ...] | None = None
    scope: Literal["batch", "sequence"] = "batch"


class DepthRouter(nn.Module):
    """Selects the tokens that a layer processes: main and auxiliary router (Equations 2 and 4)."""

    def __init__(self, dim: int, config: DepthConfig):
        super().__init__()
        self.capacity_factor, self.scope = config.capacity_factor, config.scope
        self.router = nn.Linear(dim, 1, bias=False)
        self.auxiliary = AuxiliaryRouter(dim, 1)

    def forward(
        self, x_BSD: Tensor, eligible_BS: Tensor, routing: Routing
    ) -> tuple[Selection, Diagnostics]:
        """Select tokens of [B, S, D].

        Args:
            x_BSD: tokens.
            eligible_BS: false for padding, which is never selected.
            routing: under expert choice there are c_d · N slots, or c_d times the non-padding
                tokens under actual capacity (by sequence, always c_d · S slots per sequence).

        Returns:
            The selection [R, K], its tokens in batch order, and diagnostics.
        """
        x_ND, eligible_N = x_BSD.flatten(0, 1), eligible_BS.flatten()
        logits_N1 = router_logits(self.router.weight, x_ND)
        auxiliary_N1 = auxiliary_logits(self.auxiliary, x_ND, routing)
        if routing.mode == "causal":
            assert auxiliary_N1 is not None
            selected_N1 = causal_choice(auxiliary_N1, eligible_N)
            selection = select_by_sequence(
                *(x.view_as(eligible_BS) for x in (selected_N1, logits_N1))
            )
        else:
            selection = self._choose(logits_N1.view(eligible_BS.shape), eligible_BS, routing)
        as_one_expert = Selection(*(part_RK.flatten()[None] for part_RK in selection))
        return selection, diagnose(
            as_one_expert, logits_N1, auxiliary_N1, eligible_N, routing, "depth"
        )

    def _choose(self, logits_BS: Tensor, eligible_BS: Tensor, routing: Routing) -> Selection:
        sequences = len(logits_BS) if self.scope == "sequence" else 1
        logits_RN, eligible_RN = (x.reshape(sequences, -1) for x in (logits_BS, eligible_BS))
        tokens = logits_RN.shape[1]
        if routing.capacity == "actual" and self.scope == "batch":
            tokens = int(eligible_RN.sum())
        capacity = static_capacity(self.capacity_factor, tokens)
        selection = select_top_k(logits_RN, eligible_RN, capacity)
        index_RK, order_RK = selection.index_EK.sort(dim=1)
        first_R1 = torch.arange(sequences, device=index_RK.device)[:, None] * logits_RN.shape[1]
        return Selection(
            index_RK + first_R1,
            selection.filled_EK.gather(1, order_RK),
            selection.score_EK.gather(1, order_RK),
        )
