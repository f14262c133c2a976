"""Mixture of modality-aware experts: the feed-forward of a layer (MoMa §2.2, Equation 1).

    y(x) = Σ_j g(x)_j · FFN_j(x)   over the experts j of the groups that process x's modality
    g(x)_j = sigmoid(x · W)_j      if expert j selected x, else 0

A group of experts has a router W of its own and processes the tokens of one or more modalities; in
MoMa each modality has its group. Each expert selects, among the b tokens of the micro-batch that
have these modalities, the K = b / E with its highest scores sigmoid(x · W)_j (the paper's
k_e = b_M · c_e with c_e = 1 / E). Under static capacity, b is what the recipe's modality shares
imply. A group of one expert has no router: it processes the tokens of its modalities with weight 1,
up to its capacity, which is enough if the micro-batch has these shares.

`router_logits` computes x · W, `select_top_k` selects, and `add_expert_outputs` gathers the tokens,
applies the experts, and scatter-adds their outputs weighted by g.

Shapes: see `layers.py`; E experts of a group, each with K slots for tokens; T = E·K slots,
flattened.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.model.dispatch import Dispatch, ScatterSlots
from moma.model.grouped import Product, grouped_product
from moma.model.layers import SwiGLU
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
    PolicyInputs,
    RaggedSelection,
    Routing,
    Selection,
    logistic_noise,
    may_synchronize,
    router_logits,
    select_all,
    select_ragged,
    static_capacity,
)


class RoutedExperts(NamedTuple):
    """Experts and the tokens that they selected.

    Attributes:
        gate_EDF, up_EDF, down_EFD: SwiGLU weights of the experts, views of their parameters.
        selection: K tokens of each expert, with their weights.
    """

    gate_EDF: Tensor
    up_EDF: Tensor
    down_EFD: Tensor
    selection: Selection


class GroupTokens(NamedTuple):
    """The tokens of a group's modalities.

    They are the same in every layer without mixture-of-depths, so they are found once (§3.3).

    Attributes:
        eligible_N: whether a token has one of the modalities and is not padding.
        selection: the slots of a group of one expert, if the policy has a capacity.
    """

    eligible_N: Tensor
    selection: Selection | None


def add_expert_outputs(
    total_ND: Tensor,
    x_ND: Tensor,
    routed: RoutedExperts,
    dispatch: Dispatch,
    product: Product = grouped_product,
) -> Tensor:
    """Equation 1: add g(x)_j · FFN_j(x) to the total of every token x that expert j selected.

    Args:
        total_ND: sum of other experts' outputs.
        x_ND: the tokens.
        routed: the experts and their selection.
        dispatch: see `ExpertGroup`.
        product: computes the products with the experts' matrices.

    Returns:
        The new total [N, D], in the dtype of the given one.
    """
    gate_EDF, up_EDF, down_EFD, (index_EK, filled_EK, weight_EK) = routed
    experts, capacity = index_EK.shape
    expert_T = torch.arange(experts, device=x_ND.device).repeat_interleave(capacity)
    slots = dispatch(index_EK.flatten(), filled_EK.flatten(), expert_T, len(x_ND), experts)
    x_EKD = slots.gather(x_ND).unflatten(0, index_EK.shape)
    gate_EKF, up_EKF = (product(x_EKD, [stack], None) for stack in (gate_EDF, up_EDF))
    ffn_EKD = product(functional.silu(gate_EKF) * up_EKF, [down_EFD], None)
    return slots.scatter_add(total_ND, (weight_EK[..., None] * ffn_EKD).flatten(0, 1))


def add_ragged_outputs(
    total_ND: Tensor,
    x_ND: Tensor,
    weights: Sequence[Sequence[Tensor]],
    selection: RaggedSelection,
    dispatch: Dispatch,
    product: Product = grouped_product,
) -> Tensor:
    """Equation 1 for experts with different numbers of tokens, which are concatenated.

    On a CPU, the weights of experts without tokens are not read.

    Args:
        total_ND, x_ND, dispatch, product: as for `add_expert_outputs`.
        weights: SwiGLU weights gate, up and down of the E experts, each as one or more stacks
            [E', D, F], or [E', F, D] for down; all E' add up to E.
        selection: the tokens of the experts, in the order of `weights`.

    Returns:
        The new total, as of `add_expert_outputs`.
    """
    index_T, expert_T, filled_T, weight_T, end_E = selection
    if not len(index_T):
        return total_ND
    gate, up, down = weights
    slots = dispatch(index_T, filled_T, expert_T, len(x_ND), len(end_E))
    x_TD = slots.gather(x_ND)
    gate_TF, up_TF = (product(x_TD, stacks, end_E) for stacks in (gate, up))
    ffn_TD = product(functional.silu(gate_TF) * up_TF, down, end_E)
    return slots.scatter_add(total_ND, weight_T[:, None] * ffn_TD)


def zero_total(x_ND: Tensor) -> Tensor:
    """Zeros [N, D] to sum expert outputs into, at least fp32, since outputs are added one by one.

    Allocated flat: torch.compile would merge zeros [N, D] with those of the backward of `gather`,
    and keep them alive for it.
    """
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    return x_ND.new_zeros(x_ND.numel(), dtype=dtype).view_as(x_ND)


class ExpertGroup(nn.Module):
    """A group of experts for the same modalities, with a router if it has more than one expert.

    The weights of its experts are stacked in parameters `gate` and `up` [E·D, F] and `down`
    [E·F, D]: FSDP shards the first dimension, and stacks [E, D, F] would leave ranks without a part
    if there were more of them than experts.

    Args:
        dim, hidden: widths D and F of each expert, a SwiGLU.
        modalities: indices of the modalities whose tokens the group processes.
        num_experts: number of experts E.
        capacity_share: K · E / N under static capacity; see `group_capacity_share`. Under expert
            choice capacity_share · N is the paper's b_M.
        noise: whether router logits get Gumbel-Sigmoid noise in training; see `logistic_noise`.
        dispatch: builds the `Slots` that move tokens to experts and back.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        modalities: Sequence[int],
        num_experts: int,
        capacity_share: float,
        noise: bool = False,
        dispatch: Dispatch = ScatterSlots,
    ):
        super().__init__()
        self.modalities, self.num_experts = tuple(modalities), num_experts
        self.capacity_share, self.noise, self.dispatch = capacity_share, noise, dispatch
        self.add_outputs = add_expert_outputs
        self.product: Product = grouped_product
        self.gate = nn.Parameter(torch.empty(num_experts * dim, hidden))
        self.up = nn.Parameter(torch.empty(num_experts * dim, hidden))
        self.down = nn.Parameter(torch.empty(num_experts * hidden, dim))
        if num_experts > 1:
            self.add_routers(dim)

    def add_routers(self, dim: int) -> None:
        """Create the routers of a group of several experts."""
        self.router = Router(dim, self.num_experts)
        self.auxiliary = AuxiliaryRouter(dim, self.num_experts)

    def is_ragged(self, routing: Routing) -> bool:
        """Whether experts process different numbers of tokens, instead of K slots each."""
        return routing.experts.capacity_mode is None

    def forward(
        self,
        x_ND: Tensor,
        group_tokens: GroupTokens,
        routing: Routing,
        total_ND: Tensor | None = None,
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Route the tokens of the group's modalities and add the experts' outputs.

        Args:
            x_ND: tokens of all modalities.
            group_tokens: from `find_tokens`, with the same routing.
            total_ND: outputs of other groups, to add to; if omitted, zeros.

        Returns:
            The total [N, D], in at least fp32 if `total_ND` was omitted, and the diagnostics of the
            router, if there is one and it had to decide.
        """
        total_ND = zero_total(x_ND) if total_ND is None else total_ND
        if self.is_ragged(routing):
            eligible_N = group_tokens.eligible_N
            may_skip = may_synchronize(eligible_N) and not routing.records
            if may_skip and not eligible_N.any():
                return total_ND, []
            selection, diagnostics = self._select_ragged(x_ND, eligible_N, routing)
            weights = [[stack] for stack in self.matrices()]
            parts = (self.dispatch, self.product)
            return add_ragged_outputs(total_ND, x_ND, weights, selection, *parts), diagnostics
        routed, diagnostics = self.route(x_ND, group_tokens, routing)
        return self.add_outputs(total_ND, x_ND, routed, self.dispatch, self.product), diagnostics

    def route(
        self, x_ND: Tensor, group_tokens: GroupTokens, routing: Routing
    ) -> tuple[RoutedExperts, list[Diagnostics]]:
        """Fill the experts' slots by a policy with a capacity, without computing the experts.

        Args:
            x_ND, group_tokens: as for `forward`.

        Returns:
            The experts with their selection, and the diagnostics of the router, if there is one.
        """
        if group_tokens.selection is not None:
            return RoutedExperts(*self.matrices(), group_tokens.selection), []
        selection, diagnostics = self._select(x_ND, group_tokens.eligible_N, routing)
        return RoutedExperts(*self.matrices(), selection), diagnostics

    def find_tokens(self, modality_N: Tensor, routing: Routing) -> GroupTokens:
        """Find the tokens of the group's modalities; the modality of padding is −1."""
        eligible_N = modality_N == self.modalities[0]
        for modality in self.modalities[1:]:
            eligible_N = eligible_N | (modality_N == modality)
        mode = routing.experts.capacity_mode
        if self.num_experts > 1 or mode is None:
            return GroupTokens(eligible_N, None)
        return GroupTokens(eligible_N, select_all(eligible_N, self._num_slots(eligible_N, mode)))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights by expert: gate and up [E, D, F], down [E, F, D]."""
        gate_EDF, up_EDF, down_EFD = (
            weight.unflatten(0, (self.num_experts, -1))
            for weight in (self.gate, self.up, self.down)
        )
        return gate_EDF, up_EDF, down_EFD

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, list[Diagnostics]]:
        policy = routing.experts
        inputs, auxiliary_NE = self._policy_inputs(x_ND, eligible_N, routing)
        clean_EN = None
        if self.noise and self.training and isinstance(policy, ExpertChoice):
            clean_EN = inputs.logits_RN
            inputs = inputs._replace(logits_RN=clean_EN + logistic_noise(clean_EN.T).T)
        selection, cutoff_E, excess = select_slots(policy, inputs, clean_EN)
        logits_NE = inputs.logits_RN.T
        selected_NE = selection.selected_NE(len(x_ND)) if routing.records else None
        return selection, [
            diagnose(
                selected_NE,
                logits_NE,
                auxiliary_NE,
                eligible_N,
                routing,
                cutoff_E=cutoff_E,
                excess=excess,
            )
        ]

    def _select_ragged(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[RaggedSelection, list[Diagnostics]]:
        if self.num_experts == 1:
            logit_1N = torch.full_like(eligible_N[None], torch.inf, dtype=torch.float32)
            return select_ragged(eligible_N[None], logit_1N), []  # sigmoid(∞) = 1
        inputs, auxiliary_NE = self._policy_inputs(x_ND, eligible_N, routing)
        selected_EN = routing.experts.candidates(inputs)
        selection = select_ragged(selected_EN, inputs.logits_RN)
        logits_NE = inputs.logits_RN.T
        selected_NE = selected_EN.T.to(logits_NE.dtype) if routing.records else None
        return selection, [diagnose(selected_NE, logits_NE, auxiliary_NE, eligible_N, routing)]

    def _policy_inputs(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[PolicyInputs, Tensor | None]:
        """What the policy decides by, and the auxiliary logits [N, E], if they are needed."""
        logits_NE = router_logits(self.router.weight, x_ND)
        auxiliary_NE = auxiliary_logits(self.auxiliary, x_ND, routing.experts, routing)
        inputs = PolicyInputs(
            logits_NE.T,
            eligible_N.expand(self.num_experts, -1),
            None if auxiliary_NE is None else auxiliary_NE.T,
            self.router.threshold_E[:, None],
            partial(self._num_slots, eligible_N),
        )
        return inputs, auxiliary_NE

    def _num_slots(self, eligible_N: Tensor, mode: CapacityMode) -> int:
        """K = capacity_share · N / E if static; otherwise from the number of eligible tokens."""
        if mode == "static":
            return static_capacity(self.capacity_share, len(eligible_N), self.num_experts)
        return math.ceil(int(eligible_N.sum()) / self.num_experts)


class DenseGroup(nn.Module):
    """One expert for all modalities: an ordinary feed-forward without routing.

    Args:
        dim, hidden: widths D and F.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.feed_forward = SwiGLU(dim, hidden)

    def forward(
        self, x_ND: Tensor, group_tokens: None, routing: Routing, total_ND: Tensor | None = None
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Apply the feed-forward to every token and add it to the total, [N, D]."""
        y_ND = self.feed_forward(x_ND)
        return y_ND if total_ND is None else total_ND + y_ND, []

    def find_tokens(self, modality_N: Tensor, routing: Routing) -> None:
        """Nothing: all tokens are processed."""


class MixtureOfExperts(nn.Module):
    """The feed-forward of a layer: the sum of its groups, which may share modalities."""

    def __init__(self, groups: Sequence[ExpertGroup | DenseGroup]):
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def forward(
        self,
        x_BSD: Tensor,
        modality_BS: Tensor,
        routing: Routing,
        group_tokens: Sequence[GroupTokens | None] | None = None,
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Map [B, S, D] to [B, S, D]; also return the diagnostics of the routers.

        Args:
            modality_BS: index of each token's modality; −1 for padding, which is never selected.
            group_tokens: from `find_tokens` with the same routing, if known from another layer.
        """
        if group_tokens is None:
            group_tokens = self.find_tokens(modality_BS, routing)
        total_ND, diagnostics = self.sum_groups(x_BSD.flatten(0, 1), group_tokens, routing)
        return total_ND.to(x_BSD.dtype).view_as(x_BSD), diagnostics

    def find_tokens(self, modality_BS: Tensor, routing: Routing) -> list[GroupTokens | None]:
        """Find the tokens of each group's modalities."""
        modality_N = modality_BS.flatten()
        return [group.find_tokens(modality_N, routing) for group in self.groups]  # type: ignore[operator]

    def sum_groups(
        self, x_ND: Tensor, group_tokens: Sequence[GroupTokens | None], routing: Routing
    ) -> tuple[Tensor, list[Diagnostics]]:
        """Sum the outputs of all groups, [N, D]; also return the diagnostics of the routers."""
        total_ND = zero_total(x_ND) if len(self.groups) > 1 else None
        diagnostics: list[Diagnostics] = []
        for group, own_tokens in zip(self.groups, group_tokens, strict=True):
            total_ND, own_diagnostics = group(x_ND, own_tokens, routing, total_ND)
            diagnostics += own_diagnostics
        assert total_ND is not None
        return total_ND, diagnostics

    def units(self) -> list[nn.Module]:
        """Modules to shard as FSDP units of their own: one is gathered while another computes.

        None for a single group, which is gathered with its layer.
        """
        return list(self.groups) if len(self.groups) > 1 else []
