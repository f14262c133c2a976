"""Mixture-of-depths: some layers are for some tokens only (MoMa §2.3, Equation 2).

    ĝ(x) = sigmoid(x · ŵ);   the k highest of the batch:  x + ĝ(x) · layer's update;   others:  x

The gate chooses before the modalities part ("staged"): the chosen tokens, of all modalities, go
through attention and experts among themselves. Who is not chosen is not touched at all, bit by bit.

Shapes: see `layers.py`; R sequences of K chosen tokens each: one of the whole batch, or one a row.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from moma.model.auxiliary import AuxiliaryRouter, Diagnostics, RouterOutput
from moma.model.layers import upcast
from moma.model.routing import (
    Routing,
    Selection,
    any_nonfinite,
    causal_choice,
    router_logits,
    select_top_k,
    static_capacity,
)
from moma.recipe import Config


class DepthConfig(Config):
    """Which layers choose their tokens, and how many they take.

    Attributes:
        share: part of the tokens that such a layer takes, c_d.
        layers: their numbers, from 0; left out, every second from the first on (§4.1).
        scope: among the tokens of the whole micro-batch (`batch`, §2.3), or of each row by itself
            (`row`, as in Raposo et al. 2024, arXiv 2404.02258).
    """

    capacity_factor: float = Field(0.25, gt=0, le=1)
    layers: tuple[int, ...] | None = None
    scope: Literal["batch", "sequence"] = "batch"


class DepthRouter(nn.Module):
    """The gate of a layer: a main router scores, an auxiliary router foretells (Eq. 2 and 4)."""

    def __init__(self, dim: int, config: DepthConfig):
        super().__init__()
        self.capacity_factor, self.by_row = config.capacity_factor, config.scope == "sequence"
        self.router = nn.Linear(dim, 1, bias=False)
        self.auxiliary = AuxiliaryRouter(dim, 1)

    def forward(
        self, x_BSD: Tensor, eligible_BS: Tensor, routing: Routing
    ) -> tuple[Selection, Diagnostics]:
        """Choose among [B, S, D].

        Args:
            x_BSD: tokens.
            eligible_BS: false for padding, which is never chosen.
            routing: by batch choice, a layer takes share · N slots, or by actual capacity as large
                a part of the tokens that are no padding (by row, always share · S slots a row).

        Returns:
            The selection [R, K] with tokens in the order of the batch, and what the gate tells.
        """
        x_ND, eligible_N = x_BSD.flatten(0, 1), eligible_BS.flatten()
        logits_N1 = router_logits(self.router.weight, x_ND)
        nonfinite = any_nonfinite(logits_N1, eligible_N)
        if routing.mode == "causal":
            auxiliary_logits_N1 = self.auxiliary(x_ND)
            nonfinite = nonfinite | any_nonfinite(auxiliary_logits_N1, eligible_N)
            return causal_choice(logits_N1, auxiliary_logits_N1, eligible_N), Diagnostics(
                nonfinite, None
            )
        selection = self._choose(logits_N1.view(eligible_BS.shape), eligible_BS, routing)
        if not routing.reported:
            return selection, Diagnostics(nonfinite, None)
        chosen_N1 = selection.selected_NE(len(x_ND)).sum(1, keepdim=True)
        auxiliary_logits_N1 = None
        if routing.record_auxiliary:
            auxiliary_logits_N1 = upcast(self.auxiliary(x_ND))
            nonfinite = nonfinite | any_nonfinite(auxiliary_logits_N1, eligible_N)
        record = RouterOutput(
            chosen_N1, auxiliary_logits_N1, eligible_N, logits_N1.detach(), "depth"
        )
        return selection, Diagnostics(nonfinite, record)

    def _choose(self, logits_BS: Tensor, eligible_BS: Tensor, routing: Routing) -> Selection:
        rows = len(logits_BS) if self.by_row else 1
        logits_RN, eligible_RN = logits_BS.view(rows, -1), eligible_BS.reshape(rows, -1)
        tokens = logits_RN.shape[1]
        if routing.capacity == "actual" and not self.by_row:
            tokens = int(eligible_RN.sum())
        selection = select_top_k(
            logits_RN, eligible_RN, static_capacity(self.capacity_factor, tokens)
        )
        token_RK, order_RK = selection.token_EK.sort(dim=1)
        first_R1 = torch.arange(rows, device=token_RK.device)[:, None] * logits_RN.shape[1]
        return Selection(
            token_RK + first_R1,
            selection.filled_EK.gather(1, order_RK),
            selection.score_EK.gather(1, order_RK),
        )
