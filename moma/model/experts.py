"""Mixture of modality-aware experts: the feed-forward of a layer (MoMa §2.2, Equation 1).

    y(x) = Σ_j over the experts that took x  of  s_j(x) · FFN_j(x),   s(x) = sigmoid(x · W_M)

A layer holds one group of experts for each set of modalities; a token meets only the groups of its
own modality (first step, given), and inside a group the experts choose their tokens (second step,
learned). Outputs of groups add, so groups may overlap. Shapes: see `layers.py`.
"""

import math
import re
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from moma.errors import UserError
from moma.model.auxiliary import AuxiliaryRouter, RouterRecord
from moma.model.layers import SwiGLU, widen
from moma.model.routing import Routing, Selection, choose_by_batch, choose_causally, take_all
from moma.recipe import Config
from moma.vocabulary import MODALITIES, ModalityName


class GroupConfig(Config):
    """A group of experts and the modalities whose tokens it takes."""

    modalities: tuple[ModalityName, ...] = Field(min_length=1)
    experts: int = Field(ge=1)


def named_groups(name: str) -> tuple[GroupConfig, ...]:
    """The groups of an architecture by the paper's name, such as `moe_4t4i`.

    Raises:
        UserError: the name is none of these.
    """
    if name == "dense":
        return (GroupConfig(modalities=MODALITIES, experts=1),)
    if match := re.fullmatch(r"moe_(\d+)x", name):
        return (GroupConfig(modalities=MODALITIES, experts=int(match[1])),)
    if match := re.fullmatch(r"moe_(\d+)t(\d+)i", name):
        counts = dict(zip(MODALITIES, map(int, match.groups()), strict=True))
        if 0 in counts.values():
            raise UserError(f"'{name}': every modality needs an expert; write at least 1")
        return tuple(GroupConfig(modalities=(key,), experts=n) for key, n in counts.items())
    raise UserError(
        f"'{name}': no such architecture; write dense, moe_8x, moe_4t4i (any counts), "
        "or a list of groups such as [{modalities = ['text'], experts = 4}, …]"
    )


class ExpertGroup(nn.Module):
    """The experts of one or more modalities, each a SwiGLU, run as one batched product.

    Args:
        dim, hidden: widths D and F of every expert.
        config: the group's modalities and number of experts E.
        share: the part of all tokens that belongs to these modalities; sets the static capacity.
    """

    def __init__(self, dim: int, hidden: int, config: GroupConfig, share: float):
        super().__init__()
        self.modalities = tuple(MODALITIES.index(name) for name in config.modalities)
        self.experts = config.experts
        self.share = share
        self.gate_EDF = nn.Parameter(torch.empty(config.experts, dim, hidden))
        self.up_EDF = nn.Parameter(torch.empty(config.experts, dim, hidden))
        self.down_EFD = nn.Parameter(torch.empty(config.experts, hidden, dim))

    def forward(
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, RouterRecord | None]:
        """Route the tokens of the group's modalities; others get zeros.

        Args:
            x_ND: tokens of all modalities.
            modality_N: modality of each token, −1 for padding, which never competes.
            routing: see `Routing`.
        """
        eligible_N = self._eligible(modality_N)
        selection, record = self._select(x_ND, eligible_N, routing)
        return self._run(x_ND, selection), record

    def _eligible(self, modality_N: Tensor) -> Tensor:
        eligible_N = modality_N == self.modalities[0]
        for modality in self.modalities[1:]:
            eligible_N = eligible_N | (modality_N == modality)
        return eligible_N

    def _capacity(self, eligible_N: Tensor, routing: Routing) -> int:
        """K = share · N / E (static), or from the batch's own count (actual)."""
        if routing.capacity == "static":
            # The small slack keeps a product such as 0.3 · 10 from being rounded up.
            return math.ceil(self.share * eligible_N.shape[0] / self.experts - 1e-6)
        return math.ceil(int(eligible_N.sum()) / self.experts)

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, RouterRecord | None]:
        """Without a router (one expert): all tokens of the modality."""
        count = Routing(capacity="actual") if routing.by == "causal" else routing
        return take_all(eligible_N, self._capacity(eligible_N, count)), None

    def _run(self, x_ND: Tensor, selection: Selection) -> Tensor:
        """Gather, run every expert on its own tokens, and add the weighted outputs up."""
        token_EK = selection.token_EK
        x_EKD = x_ND[token_EK.flatten()].unflatten(0, token_EK.shape)
        hidden_EKF = functional.silu(x_EKD @ self.gate_EDF) * (x_EKD @ self.up_EDF)
        y_EKD = (hidden_EKF @ self.down_EFD) * selection.weight_EK[..., None]
        y_ND = torch.zeros_like(x_ND, dtype=y_EKD.dtype)
        return y_ND.index_add(0, token_EK.flatten(), y_EKD.flatten(0, 1)).to(x_ND.dtype)


class RoutedGroup(ExpertGroup):
    """A group of several experts: a main router scores, an auxiliary router foretells."""

    def __init__(self, dim: int, hidden: int, config: GroupConfig, share: float):
        super().__init__(dim, hidden, config, share)
        self.router = nn.Linear(dim, config.experts, bias=False)
        self.auxiliary = AuxiliaryRouter(dim, config.experts)

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, RouterRecord | None]:
        # Rounded scores would tie: the choice is made in fp32, whatever the rest is computed in.
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = functional.linear(widen(x_ND), widen(self.router.weight))
        if routing.by == "causal":
            return choose_causally(logits_NE, self.auxiliary(x_ND), eligible_N), None
        selection = choose_by_batch(logits_NE, eligible_N, self._capacity(eligible_N, routing))
        if not routing.record:
            return selection, None
        chosen_NE = selection.chosen_NE(x_ND.shape[0])
        return selection, RouterRecord(chosen_NE, widen(self.auxiliary(x_ND)), eligible_N)


class DenseGroup(SwiGLU):
    """One expert for every modality is a plain feed-forward: nothing to route."""

    def forward(  # type: ignore[override]
        self, x_ND: Tensor, modality_N: Tensor, routing: Routing
    ) -> tuple[Tensor, RouterRecord | None]:
        """Apply the feed-forward to every token, [N, D] to [N, D]."""
        return super().forward(x_ND), None


def make_group(
    dim: int, hidden: int, config: GroupConfig, shares: Sequence[float]
) -> ExpertGroup | DenseGroup:
    """The cheapest module that computes a group; `shares` holds the part of each modality."""
    if config.experts == 1 and set(config.modalities) == set(MODALITIES):
        return DenseGroup(dim, hidden)
    share = sum(shares[MODALITIES.index(name)] for name in config.modalities)
    kind = ExpertGroup if config.experts == 1 else RoutedGroup
    return kind(dim, hidden, config, share)


class Experts(nn.Module):
    """The feed-forward of a layer: its groups, added up."""

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def forward(
        self, x_BSD: Tensor, modality_BS: Tensor, routing: Routing
    ) -> tuple[Tensor, list[RouterRecord]]:
        """Map [B, S, D] to [B, S, D] and return what the routers did.

        Group after group: under sharding, the next group's weights arrive while one computes.
        """
        x_ND, modality_N = x_BSD.flatten(0, 1), modality_BS.flatten()
        outputs, records = zip(
            *(group(x_ND, modality_N, routing) for group in self.groups), strict=True
        )
        total_ND = sum(outputs[1:], start=outputs[0])
        return total_ND.view_as(x_BSD), [record for record in records if record is not None]
