"""Mixture-of-depths: some layers process only some tokens (MoMa §2.3, Equation 2).

    ĝ(x) = sigmoid(x · Ŵ_g);  the k_d = b · c_d highest-scored tokens:  x + ĝ(x) · update(x);
    the others:  x

The depth router acts before the split by modality ("staged"): the selected tokens of all
modalities pass through attention and experts, attending only to each other. All other tokens are
left unchanged, bit for bit.

Tokens may also compete only with those of their modality, for its own slots (`modality_factors`).

Shapes: see `layers.py`; R sequences of K selected tokens each: one for the whole micro-batch, or
one per sequence of it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from moma.errors import UserError
from moma.model.routers import (
    AuxiliaryRouter,
    Diagnostics,
    Router,
    auxiliary_logits,
    diagnose,
    select_slots,
)
from moma.model.routing import (
    CapacityMode,
    ExpertChoice,
    Policy,
    PolicyInputs,
    Routing,
    Selection,
    logistic_noise,
    router_logits,
    select_by_sequence,
    select_top_k,
    static_capacity,
)
from moma.recipe import Config
from moma.vocabulary import MODALITIES


class DepthConfig(Config):
    """Which layers use mixture-of-depths, and how many tokens they process.

    Attributes:
        capacity_factor: fraction c_d of the tokens that such a layer processes.
        layers: layer numbers, from 0; if omitted, every second layer from the first (§4.1).
        scope: tokens compete within the whole micro-batch (`batch`, §2.3) or within their
            `sequence` (Raposo et al. 2024, arXiv 2404.02258).
        modality_factors: fraction of the tokens of each modality, instead of `capacity_factor`;
            tokens then compete with those of their modality, and each has a threshold of its own.
        router_loss: weight of a loss that trains the routers to score selected tokens above one
            half and others below (Raposo et al. 2024 §3.5), for the routing `half`; 0: none.
        noise: whether the depth routers' logits get Gumbel-Sigmoid noise in training (Equation 5),
            so that the model meets other decisions than those of the batch.
    """

    capacity_factor: float = Field(0.25, gt=0, le=1)
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    scope: Literal["batch", "sequence"] = "batch"
    modality_factors: dict[str, Annotated[float, Field(gt=0, le=1)]] | None = None
    router_loss: float = Field(0.0, ge=0)
    noise: bool = False

    @model_validator(mode="after")
    def _check_modality_factors(self) -> "DepthConfig":
        if self.modality_factors is None:
            return self
        # The recipe of a run has all keys, with their defaults.
        if self.capacity_factor != type(self).model_fields["capacity_factor"].default:
            raise ValueError("modality_factors replaces capacity_factor; leave that out")
        if self.scope == "sequence":
            raise ValueError(
                "modality_factors needs scope = 'batch': a sequence may have any number of images"
            )
        return self

    def factors(self, modalities: Sequence[str] = MODALITIES) -> list[float]:
        """The fraction of each modality's tokens that a layer processes.

        Raises:
            UserError: `modality_factors` does not have exactly these modalities.
        """
        by_name = self.modality_factors or {}
        if by_name.keys() != set(modalities):
            names = ", ".join(modalities)
            raise UserError(f"depth.modality_factors: give one factor for each of {names}")
        return [by_name[name] for name in modalities]

    def token_fraction(
        self, shares: Sequence[float], modalities: Sequence[str] = MODALITIES
    ) -> float:
        """The fraction of all tokens that a layer processes, given each modality's share."""
        if self.modality_factors is None:
            return self.capacity_factor
        factors = self.factors(modalities)
        return sum(share * factor for share, factor in zip(shares, factors, strict=True))

    def layer_shares(
        self, shares: Sequence[float], modalities: Sequence[str] = MODALITIES
    ) -> tuple[list[float], float]:
        """Return `shares` and `token_fraction` of `group_capacity_share` for the selected tokens.

        Their modalities have known numbers if each has its own slots.
        """
        if self.modality_factors is None:
            return [*shares], self.capacity_factor
        total, factors = self.token_fraction(shares, modalities), self.factors(modalities)
        return [s * factor / total for s, factor in zip(shares, factors, strict=True)], 1.0


class DepthRouter(nn.Module):
    """Selects the tokens that a layer processes (Equations 2 and 4).

    Args:
        dim: width D.
        config: see `DepthConfig`.
        shares: fraction of each modality among all tokens; needed by `modality_factors`.
        modalities: names of the modalities, in the order of `shares`.
    """

    def __init__(
        self,
        dim: int,
        config: DepthConfig,
        shares: Sequence[float] = (),
        modalities: Sequence[str] = MODALITIES,
    ):
        super().__init__()
        self.scope, self.noise, self.router_loss = config.scope, config.noise, config.router_loss
        # Of each pool of competing tokens: the fraction of its tokens and of all tokens.
        self.factors = [config.capacity_factor]
        self.shares = [1.0]
        self.by_modality = config.modality_factors is not None
        if self.by_modality:
            self.factors, self.shares = config.factors(modalities), [*shares]
        self.router = Router(dim, 1, pools=len(self.factors))
        self.auxiliary = AuxiliaryRouter(dim, 1)

    def forward(
        self,
        x_BSD: Tensor,
        modality_BS: Tensor,
        routing: Routing,
        segment_BS: Tensor | None = None,
    ) -> tuple[Selection, Diagnostics]:
        """Select tokens of [B, S, D].

        Args:
            modality_BS: index of the modality; −1 for padding, which is never selected.
            routing: static capacity is c_d · N slots, actual capacity c_d times the non-padding
                tokens (by sequence, always c_d · S slots per sequence); by modality, of its share
                of N or its own tokens.
            segment_BS: segments of attention, needed by thresholds with a capacity; see `Segments`.

        Returns:
            The selection [R, K], its tokens in batch order, and diagnostics.
        """
        policy = routing.depth
        x_ND, eligible_BS = x_BSD.flatten(0, 1), modality_BS >= 0
        logits_N1 = router_logits(self.router.weight, x_ND)
        auxiliary_N1 = auxiliary_logits(self.auxiliary, x_ND, policy, routing)
        is_noisy = self.noise and self.training and isinstance(policy, ExpertChoice)
        noise_N1 = logistic_noise(logits_N1) if is_noisy else None
        pools = list(self._pools(logits_N1, auxiliary_N1, modality_BS))
        cutoff_P, excess = None, None
        if policy.capacity_mode is None:
            selected_P = [policy.candidates(inputs).view_as(eligible_BS) for inputs in pools]
            selected_BS = torch.stack(selected_P).any(0)
            selection = select_by_sequence(selected_BS, logits_N1.view_as(eligible_BS))
        else:
            selection, cutoff_P, excess = self._fill_slots(
                policy, pools, logits_N1, noise_N1, segment_BS
            )
        diagnostics = self._diagnose(
            selection, logits_N1, auxiliary_N1, eligible_BS, routing, cutoff_P, excess
        )
        return selection, diagnostics

    def _diagnose(
        self,
        selection: Selection,
        logits_N1: Tensor,
        auxiliary_N1: Tensor | None,
        eligible_BS: Tensor,
        routing: Routing,
        cutoff_P: Tensor | None,
        excess: Tensor | None,
    ) -> Diagnostics:
        """See `diagnose`; in training also the loss of the depth router."""
        has_slots = routing.depth.capacity_mode is not None
        has_loss = self.router_loss > 0 and self.training and has_slots
        selected_N1 = loss = None
        if routing.records or has_loss:
            flat = Selection(*(part_RK.flatten()[None] for part_RK in selection))
            selected_N1 = flat.selected_NE(len(logits_N1))
            if has_loss:
                loss = self.router_loss * _cross_entropy(logits_N1, selected_N1, eligible_BS)
        return diagnose(
            selected_N1,
            logits_N1,
            auxiliary_N1,
            eligible_BS.flatten(),
            routing,
            "depth",
            cutoff_P,
            excess,
            loss=loss,
        )

    def _fill_slots(
        self,
        policy: Policy,
        pools: Sequence[PolicyInputs],
        logits_N1: Tensor,
        noise_N1: Tensor | None,
        segment_BS: Tensor | None,
    ) -> tuple[Selection, Tensor, Tensor | None]:
        """See `select_slots`; the cutoffs are those of the pools, [P]."""
        found = [_select(policy, inputs, noise_N1) for inputs in pools]
        selections, cutoffs, excesses = zip(*found, strict=True)
        if len(pools) > 1:
            noisy_N1 = logits_N1 if noise_N1 is None else logits_N1 + noise_N1
            selection = _join(selections, noisy_N1.T)
        else:
            (selection,) = selections
        cutoff_P = torch.cat([cutoff_R.mean(0, True) for cutoff_R in cutoffs])
        excess = None if excesses[0] is None else torch.stack(excesses).sum()
        may_be_empty = excess is not None or self.by_modality
        length = pools[0].logits_RN.shape[1]
        selection = _in_batch_order(selection, length, segment_BS if may_be_empty else None)
        return selection, cutoff_P, excess

    def _pools(
        self, logits_N1: Tensor, auxiliary_N1: Tensor | None, modality_BS: Tensor
    ) -> Iterator[PolicyInputs]:
        """Yield what the policy decides by, for each pool of tokens: all, or each modality's."""
        rows = len(modality_BS) if self.scope == "sequence" else 1
        logits_RN = logits_N1.reshape(rows, -1)
        auxiliary_RN = None if auxiliary_N1 is None else auxiliary_N1.reshape(rows, -1)
        for number, threshold_11 in enumerate(self.router.threshold_E[:, None, None].unbind()):
            eligible_BS = modality_BS == number if self.by_modality else modality_BS >= 0
            eligible_RN = eligible_BS.reshape(rows, -1)
            num_slots = partial(self._num_slots, number, eligible_RN)
            yield PolicyInputs(logits_RN, eligible_RN, auxiliary_RN, threshold_11, num_slots)

    def _num_slots(self, pool: int, eligible_RN: Tensor, mode: CapacityMode) -> int:
        factor, tokens = self.factors[pool], eligible_RN.shape[1]
        if mode == "actual" and self.scope == "batch":
            return static_capacity(factor, int(eligible_RN.sum()))
        return static_capacity(factor * self.shares[pool], tokens)


def _select(
    policy: Policy, inputs: PolicyInputs, noise_N1: Tensor | None
) -> tuple[Selection, Tensor, Tensor | None]:
    """See `select_slots`; noise is added to the logits."""
    if noise_N1 is None:
        return select_slots(policy, inputs)
    noisy_RN = inputs.logits_RN + noise_N1.view_as(inputs.logits_RN)
    return select_slots(policy, inputs._replace(logits_RN=noisy_RN), inputs.logits_RN)


def _join(selections: Sequence[Selection], logits_1N: Tensor) -> Selection:
    """Join selections of the same tokens so that empty slots hold tokens that none selected."""
    selected_1N = torch.zeros_like(logits_1N)
    for selection in selections:
        selected_1N = selected_1N + selection.selected_NE(logits_1N.shape[1]).T
    num_slots = sum(selection.index_EK.shape[1] for selection in selections)
    return select_top_k(logits_1N, selected_1N > 0, num_slots)


def _cross_entropy(logits_N1: Tensor, selected_N1: Tensor, eligible_BS: Tensor) -> Tensor:
    """Mean cross-entropy of the decisions that scores above one half would make."""
    loss_N1 = functional.binary_cross_entropy_with_logits(logits_N1, selected_N1, reduction="none")
    eligible_N1 = eligible_BS.flatten()[:, None]
    return (loss_N1 * eligible_N1).sum() / eligible_N1.sum().clamp(min=1)


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
        selection.weight_EK.gather(1, order_RK),
    )
