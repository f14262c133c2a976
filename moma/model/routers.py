"""Routers, and what they return besides a selection (MoMa §2.2, §2.4).

Shapes: see `layers.py`; R rows of tokens as in `routing.py`.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.layers import upcast
from moma.model.routing import (
    Policy,
    PolicyInputs,
    Routing,
    Selection,
    any_nonfinite,
    cutoffs_of,
    select_top_k,
)

RouterKind = Literal["experts", "depth"]
# The running mean of the cutoffs is over about the last tenth of all steps, and at most 100.
AVERAGED_SHARE = 0.1
MAX_AVERAGED_STEPS = 100


class AuxiliaryRouter(nn.Module):
    """Predicts expert choice from one token (§2.4, Equations 3 and 4).

        g_aux(x) = sigmoid(SiLU(x · W_a1) · W_a2)

    Args:
        dim: width D; W_a1 is D × D/2.
        outputs: number of experts E, or 1 for mixture-of-depths; W_a2 is D/2 × outputs.
    """

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.hidden = nn.Linear(dim, dim // 2, bias=False)
        self.output = nn.Linear(dim // 2, outputs, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [N, D] to the logits of g_aux, [N, E], in fp32 like those of main routers."""
        with torch.autocast(x_ND.device.type, enabled=False):
            hidden_NH = functional.linear(upcast(x_ND), upcast(self.hidden.weight))
            return functional.linear(functional.silu(hidden_NH), upcast(self.output.weight))


class Router(nn.Linear):
    """The main router of a group of experts, or of a layer with mixture-of-depths.

    It keeps running means of the cutoffs of expert choice, which are thresholds for causal routing
    (arXiv 2603.11535).

    Args:
        dim: width D.
        outputs: number of experts E; 1 for mixture-of-depths.
        pools: number of pools of tokens with cutoffs of their own, if it is not E.

    Attributes:
        cutoff_means_3E: means over steps of the finite cutoffs (else 0) and of their share; number
            of steps.
    """

    cutoff_means_3E: Tensor

    def __init__(self, dim: int, outputs: int, pools: int | None = None):
        super().__init__(dim, outputs, bias=False)
        zeros_3E = torch.zeros(3, pools or outputs, dtype=torch.float32)
        self.register_buffer("cutoff_means_3E", zeros_3E)

    @property
    def threshold_E(self) -> Tensor:
        """The mean cutoff of each expert, in fp32; −∞ if most micro-batches had none."""
        mean_E, finite_E, _ = self.cutoff_means_3E
        return torch.where(finite_E > 0.5, mean_E / finite_E, -torch.inf)

    def update_cutoffs(self, mean_2E: Tensor) -> None:
        """Add a step to the running means.

        Args:
            mean_2E: sum of the finite cutoffs of the step's micro-batches, and number of these,
                both divided by the number of micro-batches.
        """
        steps_E = self.cutoff_means_3E[2].add_(1)
        weight_E = (1 / (AVERAGED_SHARE * steps_E)).clamp(1 / MAX_AVERAGED_STEPS, 1)
        self.cutoff_means_3E[:2].lerp_(mean_2E, weight_E)


def auxiliary_logits(
    auxiliary: AuxiliaryRouter, x_ND: Tensor, policy: Policy, routing: Routing
) -> Tensor | None:
    """Return the logits [N, E] of an auxiliary router, if `policy` or `routing` needs them."""
    is_needed = policy.uses_auxiliary or routing.record_auxiliary
    # Auxiliary routers that are trained together with the model do not change it.
    return auxiliary(x_ND.detach()) if is_needed else None


def select_slots(
    policy: Policy, inputs: PolicyInputs, clean_logits_RN: Tensor | None = None
) -> tuple[Selection, Tensor, Tensor | None]:
    """Select the tokens of a policy with a capacity.

    Args:
        policy: its `capacity_mode` is not None.
        inputs: what it decides by.
        clean_logits_RN: the logits without noise, if noise was added to those of `inputs`.

    Returns:
        The selection; the cutoffs of expert choice by clean logits, [R]; and the number of
        candidates (row, token) that found no slot, None under expert choice.
    """
    assert policy.capacity_mode is not None
    num_slots = inputs.num_slots(policy.capacity_mode)
    candidate_RN = policy.candidates(inputs)
    selection = chosen = select_top_k(inputs.logits_RN, candidate_RN, num_slots)
    is_expert_choice = candidate_RN is inputs.eligible_RN
    clean_RN = inputs.logits_RN if clean_logits_RN is None else clean_logits_RN
    if not is_expert_choice or clean_logits_RN is not None:
        chosen = select_top_k(clean_RN, inputs.eligible_RN, num_slots)
    cutoff_R = cutoffs_of(clean_RN, inputs.eligible_RN, chosen.index_EK)
    excess = None if is_expert_choice else candidate_RN.sum() - selection.filled_EK.sum()
    return selection, cutoff_R, excess


class RouterRecord(NamedTuple):
    """What one router computed in a forward pass, returned as an output to train on.

    Compiled layers return it: torch 2.11 cannot return what `_replace` makes.

    Attributes:
        selected_NE: 1 where expert e selected token n, else 0.
        auxiliary_logits_NE: the auxiliary router's logits, if requested.
        eligible_N: the tokens that the router selected from.
        logits_NE: the main router's logits, detached.
        kind: a router of `experts`, or of mixture-of-depths (`depth`, with E = 1).
        excess: number of pairs (token, expert) that thresholds or token choice selected, but that
            found no slot; None under expert choice, and without a capacity.
        token_choice_weight_NE: weights of the experts' outputs under token choice, valid where an
            expert processes the token, detached; None: the scores, sigmoids of the logits.
    """

    selected_NE: Tensor
    auxiliary_logits_NE: Tensor | None
    eligible_N: Tensor
    logits_NE: Tensor
    kind: RouterKind = "experts"
    excess: Tensor | None = None
    token_choice_weight_NE: Tensor | None = None

    @property
    def weight_NE(self) -> Tensor:
        """The weight of each expert's output; 0 where it does not process the token."""
        weight_NE = self.token_choice_weight_NE
        weight_NE = self.logits_NE.sigmoid() if weight_NE is None else weight_NE
        return weight_NE * self.selected_NE

    def scatter(self, index_K: Tensor, tokens: int) -> "RouterRecord":
        """Expand a record of only the tokens `index_K` to all N tokens, with zeros elsewhere."""

        def expand(part: Tensor) -> Tensor:
            return part.new_zeros(tokens, *part.shape[1:]).index_copy(0, index_K, part)

        auxiliary, weight = self.auxiliary_logits_NE, self.token_choice_weight_NE
        return RouterRecord(
            selected_NE=expand(self.selected_NE),
            auxiliary_logits_NE=None if auxiliary is None else expand(auxiliary),
            eligible_N=expand(self.eligible_N),
            logits_NE=expand(self.logits_NE),
            kind=self.kind,
            excess=self.excess,
            token_choice_weight_NE=None if weight is None else expand(weight),
        )


def finite_cutoffs(cutoffs: Sequence[Tensor]) -> Tensor:
    """The finite cutoffs of a micro-batch, else 0, and whether each is finite, fp32 [2, P].

    Args:
        cutoffs: of each router, together P; see `ModelOutput`.
    """
    cutoff_P = torch.cat([*cutoffs])
    is_finite_P = cutoff_P.isfinite()
    return torch.stack((cutoff_P.where(is_finite_P, 0), is_finite_P.to(cutoff_P.dtype)))


class Diagnostics(NamedTuple):
    """What a router, or a layer's output, reports besides its result.

    Compiled layers return it; see `RouterRecord`.

    Attributes:
        nonfinite: boolean on the device: whether a router's logit or the output is NaN or infinite;
            None if it was not checked.
        record: the router's record, if requested.
        cutoff_E: if the policy has a capacity, the cutoffs of expert choice by the router's logits.
        load_O: the load of a router under token choice; see `TokenChoices`.
        loss: a loss of the router itself, with its weight, to add to the mean loss of the targets.
    """

    nonfinite: Tensor | None
    record: RouterRecord | None = None
    cutoff_E: Tensor | None = None
    load_O: Tensor | None = None
    loss: Tensor | None = None


def diagnose(
    selected_NE: Tensor | None,
    logits_NE: Tensor,
    auxiliary_logits_NE: Tensor | None,
    eligible_N: Tensor,
    routing: Routing,
    kind: RouterKind = "experts",
    cutoff_E: Tensor | None = None,
    excess: Tensor | None = None,
    token_choice_weight_NE: Tensor | None = None,
    load_O: Tensor | None = None,
    loss: Tensor | None = None,
) -> Diagnostics:
    """Check a router's logits, and record its selection if `routing` requests it.

    Args:
        selected_NE: as in `RouterRecord`; needed only if `routing.records`.
        logits_NE, auxiliary_logits_NE, eligible_N, kind, excess: as in `RouterRecord`.
        routing: see `Routing`.
        token_choice_weight_NE: as in `RouterRecord`.
        cutoff_E, load_O, loss: as in `Diagnostics`.

    Returns:
        Only `load_O` and `loss`, with None for the rest, if `routing.checks` is false.
    """
    if not routing.checks:
        return Diagnostics(None, load_O=load_O, loss=loss)
    nonfinite = any_nonfinite(logits_NE, eligible_N)
    if auxiliary_logits_NE is not None:
        nonfinite = nonfinite | any_nonfinite(auxiliary_logits_NE, eligible_N)
    if not routing.records:
        return Diagnostics(nonfinite, cutoff_E=cutoff_E, load_O=load_O, loss=loss)
    assert selected_NE is not None
    weight_NE = token_choice_weight_NE
    record = RouterRecord(
        selected_NE=selected_NE,
        auxiliary_logits_NE=auxiliary_logits_NE,
        eligible_N=eligible_N,
        logits_NE=logits_NE.detach(),
        kind=kind,
        excess=excess,
        token_choice_weight_NE=None if weight_NE is None else weight_NE.detach(),
    )
    return Diagnostics(nonfinite, record, cutoff_E=cutoff_E, load_O=load_O, loss=loss)
