"""Token selection: which expert processes which token.

Training uses expert choice (MoMa §2.2; arXiv 2202.09368): each expert selects the tokens that it
scores highest in the micro-batch. Because that depends on later tokens, generation decides each
token on its own: by the auxiliary router (§2.4), or by whether its logit exceeds a threshold that
was recorded while training (arXiv 2603.11535).

A policy names the tokens that an expert may process, and by `capacity_mode` whether their number is
limited. With a capacity, the result is a `Selection` with the same number of slots for each expert;
without a capacity, it is a `RaggedSelection`, in which each expert has as many tokens as it
selected. The policies also serve mixture-of-depths (`depth.py`), where `Routing` may name another
one.

Shapes: see `layers.py`. E is the number of experts in a group, K the slots of each expert. A row
holds the logits of the tokens that compete with each other for one expert or one depth router; R
rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moma.model.layers import upcast

CausalName = Literal["threshold", "auxiliary", "half"]
RoutingName = Literal["choice", "causal", "threshold", "auxiliary", "half"]
CapacityMode = Literal["static", "actual"]

# With at most this many experts, router logits are computed expert by expert.
FEW_EXPERTS = 16
# At most this many tokens on a GPU are routed causally without waiting for it.
MAX_UNSYNCHRONIZED_TOKENS = 64


class PolicyInputs(NamedTuple):
    """What a policy decides by; each of R rows holds N tokens that compete with each other.

    Attributes:
        logits_RN: the main router's logits.
        eligible_RN: whether a token has one of the row's modalities and is not padding.
        auxiliary_RN: the auxiliary router's logits, if the policy uses them.
        threshold_R1: thresholds of the main router's logits; −∞: all tokens exceed it.
        num_slots: number of slots K of a row, given the capacity mode.
    """

    logits_RN: Tensor
    eligible_RN: Tensor
    auxiliary_RN: Tensor | None
    threshold_R1: Tensor
    num_slots: Callable[[CapacityMode], int]


@dataclass(frozen=True)
class ExpertChoice:
    """Expert choice: each row selects its highest-scored eligible tokens.

    A row is one of the experts (Equation 1), or of a depth router (Equation 2).

    Attributes:
        capacity_mode: what determines the slots of a row: the recipe's modality shares (`static`),
            so that all shapes are known in advance, or the tokens of the micro-batch (`actual`).
    """

    capacity_mode: CapacityMode = "static"
    uses_auxiliary: ClassVar[bool] = False

    def candidates(self, inputs: PolicyInputs) -> Tensor:
        """The tokens that compete for slots, boolean [R, N]."""
        return inputs.eligible_RN


@dataclass(frozen=True)
class Threshold:
    """A token is taken if its logit exceeds the row's threshold: causal without a capacity.

    Attributes:
        capacity_mode: as for `ExpertChoice`; the lowest-scored tokens beyond the slots are dropped.
            None: without a capacity.
    """

    capacity_mode: CapacityMode | None = None
    uses_auxiliary: ClassVar[bool] = False

    def candidates(self, inputs: PolicyInputs) -> Tensor:
        """The tokens whose logit exceeds the threshold, boolean [R, N]."""
        return (inputs.logits_RN > inputs.threshold_R1) & inputs.eligible_RN


@dataclass(frozen=True)
class Auxiliary:
    """A token is taken if the auxiliary router's g_aux(x) > 0.5 (§2.4); this is causal."""

    capacity_mode: ClassVar[None] = None
    uses_auxiliary: ClassVar[bool] = True

    def candidates(self, inputs: PolicyInputs) -> Tensor:
        """The tokens with g_aux(x) > 0.5, boolean [R, N]."""
        assert inputs.auxiliary_RN is not None
        return (inputs.auxiliary_RN > 0) & inputs.eligible_RN


@dataclass(frozen=True)
class Half:
    """A token is taken if its score exceeds one half (arXiv 2404.02258 §3.5); this is causal."""

    capacity_mode: ClassVar[None] = None
    uses_auxiliary: ClassVar[bool] = False

    def candidates(self, inputs: PolicyInputs) -> Tensor:
        """The tokens with a score above one half, boolean [R, N]."""
        return (inputs.logits_RN > 0) & inputs.eligible_RN


@dataclass(frozen=True)
class Noisy:
    """Another policy whose decisions are each inverted at random (the ablation of §4.6).

    Uses PyTorch's global generator.

    Attributes:
        rate: probability that a decision on an eligible token is inverted (σ in §4.6).
    """

    policy: "Policy"
    rate: float
    capacity_mode: ClassVar[None] = None

    @property
    def uses_auxiliary(self) -> bool:
        """Whether the other policy uses auxiliary logits."""
        return self.policy.uses_auxiliary

    def candidates(self, inputs: PolicyInputs) -> Tensor:
        """The other policy's tokens, with inverted decisions, boolean [R, N]."""
        selected_RN = selected_by(self.policy, inputs)
        inverted_RN = torch.rand_like(inputs.logits_RN) < self.rate
        return (selected_RN ^ inverted_RN) & inputs.eligible_RN


Policy = ExpertChoice | Threshold | Auxiliary | Half | Noisy


def selected_by(policy: Policy, inputs: PolicyInputs) -> Tensor:
    """Whether a policy selects each token, boolean [R, N]."""
    candidate_RN = policy.candidates(inputs)
    if policy.capacity_mode is None:
        return candidate_RN
    num_slots = inputs.num_slots(policy.capacity_mode)
    selection = select_top_k(inputs.logits_RN, candidate_RN, num_slots)
    return selection.selected_NE(candidate_RN.shape[1]).T.bool()


@dataclass(frozen=True)
class Routing:
    """How a forward pass routes its tokens.

    Attributes:
        experts: the policy of groups of experts.
        depth: the policy of mixture-of-depths.
        raises: whether a forward pass raises an error for non-finite values, if it synchronizes
            with the device anyway. False where ranks share weights: the others would wait forever
            for the rank that raised.
        record_auxiliary: whether to return a `RouterRecord` of each router with auxiliary logits.
        record_selection: whether to return these records; implied by `record_auxiliary`.
        checks: whether non-finite values are looked for; decoding one token costs less without.
    """

    experts: Policy = field(default_factory=ExpertChoice)
    depth: Policy = field(default_factory=ExpertChoice)
    raises: bool = True
    record_auxiliary: bool = False
    record_selection: bool = False
    checks: bool = True

    @property
    def records(self) -> bool:
        """Whether a `RouterRecord` is returned of each router."""
        return self.record_auxiliary or self.record_selection

    @property
    def synchronizes(self) -> bool:
        """Whether shapes depend on the data, so that the device is waited for."""
        return any(policy.capacity_mode != "static" for policy in (self.experts, self.depth))


def uniform_routing(policy: Policy, **flags: bool) -> Routing:
    """Routing by the same policy for experts and depth, with flags of `Routing`."""
    return Routing(policy, policy, **flags)


# A model's own causal routing is `Transformer.causal_routing`.
ROUTINGS: dict[RoutingName, Routing] = {
    "choice": uniform_routing(ExpertChoice("actual")),
    "threshold": uniform_routing(Threshold()),
    "auxiliary": uniform_routing(Auxiliary()),
    "half": Routing(Threshold(), Half()),
}


class Selection(NamedTuple):
    """The tokens that each row selected: an expert, or a row of `DepthRouter` (then E is R).

    Attributes:
        index_EK: int64 index of the token in each slot, into the N tokens.
        filled_EK: whether the slot holds a token; an expert may have more slots than tokens.
        weight_EK: weight of the expert's output (g in Equation 1): the score, sigmoid(logit), or
            what token choice says; exactly 0 in an empty slot, so that the slot adds nothing to
            the output and receives no gradient.
    """

    index_EK: Tensor
    filled_EK: Tensor
    weight_EK: Tensor

    def selected_NE(self, tokens: int) -> Tensor:
        """Return 1 where expert e processes token n, else 0, shape [N, E]."""
        zeros_EN = self.weight_EK.new_zeros(len(self.index_EK), tokens)
        return zeros_EN.scatter_add(1, self.index_EK, self.filled_EK.to(zeros_EN.dtype)).T


class RaggedSelection(NamedTuple):
    """The tokens that each expert processes, of any number, concatenated expert after expert.

    Attributes:
        index_T: int64 index of the token, into the N tokens.
        expert_T: int64 index of the expert.
        filled_T: whether the slot holds a token.
        weight_T: weight of the expert's output, as in `Selection`; 0 in an empty slot.
        end_E: int32 index one past each expert's last slot; T for the last expert.
    """

    index_T: Tensor
    expert_T: Tensor
    filled_T: Tensor
    weight_T: Tensor
    end_E: Tensor


def router_logits(weight_ED: Tensor, x_ND: Tensor) -> Tensor:
    """Compute the logits of a main router, in fp32 even under autocast: rounded ones would tie.

    Args:
        weight_ED: the router's weight; E = 1 for a depth router.

    Returns:
        Logits [N, E]; for few experts stored expert by expert, which is the order of top-k.
    """
    with torch.autocast(x_ND.device.type, enabled=False):
        if len(weight_ED) > FEW_EXPERTS or not torch.is_grad_enabled():
            return functional.linear(upcast(x_ND), upcast(weight_ED))
        return _LogitsOfFewExperts.apply(upcast(x_ND), upcast(weight_ED)).T


class _LogitsOfFewExperts(torch.autograd.Function):
    """W · xᵀ, [E, N], one expert at a time.

    torch.compile fuses matrix-vector products and sums of outer products into neighboring
    kernels; as matrix products with few rows they are separate and slower (docs/results/layer.md).
    Only the weight's gradient is faster as a matrix product.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return torch.stack([x_ND @ weight_D for weight_D in weight_ED.unbind()])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_ED = ctx.saved_tensors
        (grad_EN,) = grads
        parts = zip(grad_EN.unbind(), weight_ED.unbind(), strict=True)
        grad_x_ND = sum(grad_N[:, None] * weight_D for grad_N, weight_D in parts)
        return grad_x_ND, grad_EN @ x_ND


def static_capacity(share: float, tokens: int, experts: int = 1) -> int:
    """Slots of an expert, K = share · N / E, rounded up."""
    # The tolerance keeps an inexact product such as 0.3 · 10 from being rounded up.
    return math.ceil(share * tokens / experts - 1e-6)


def logistic_noise(logits_NE: Tensor) -> Tensor:
    """Sample G′ − G″ of Gumbel-Sigmoid, sigmoid(z + G′ − G″) (MoMa §2.5, Equation 5).

    The difference of two independent Gumbel(0, 1) variables is logistic: log(u / (1 − u)) with u
    uniform. Uses PyTorch's global generator.
    """
    return torch.rand_like(logits_NE).logit(eps=1e-7)


def any_nonfinite(logits_NE: Tensor, eligible_N: Tensor) -> Tensor:
    """Whether an eligible token has a NaN or infinite logit, as a boolean on the device.

    A NaN would win every top-k. The flag is checked later, without synchronizing here.
    """
    return (~logits_NE.detach().isfinite().all(1) & eligible_N).any()


def select_top_k(logits_EN: Tensor, eligible_EN: Tensor, capacity: int) -> Selection:
    """Select the `capacity` highest eligible logits of each row of N; at most N.

    Rows are experts that score the same tokens, or, in `DepthRouter`, sequences of tokens. Slots
    beyond the eligible tokens stay empty. The order of the slots is undefined.
    """
    masked_EN = logits_EN.detach().masked_fill(~eligible_EN, -torch.inf)
    num_slots = min(capacity, logits_EN.shape[1])
    index_EK = masked_EN.topk(num_slots, dim=1, sorted=False).indices
    filled_EK = eligible_EN.gather(1, index_EK)
    return Selection(index_EK, filled_EK, logits_EN.gather(1, index_EK).sigmoid() * filled_EK)


def cutoffs_of(logits_EN: Tensor, eligible_EN: Tensor, index_EK: Tensor) -> Tensor:
    """The midpoint of each row's lowest selected and highest other eligible logit, [E].

    But for equal logits, exactly the tokens whose logit exceeds it were selected. −∞ in a row that
    selected all its tokens, ∞ if K = 0.

    Args:
        logits_EN, eligible_EN: as for `select_top_k`.
        index_EK: what it selected.
    """
    if not index_EK.shape[1]:
        return logits_EN.new_full((len(logits_EN),), torch.inf)
    masked_EN = logits_EN.detach().masked_fill(~eligible_EN, -torch.inf)
    lowest_E = masked_EN.gather(1, index_EK).amin(1)
    others_EN = masked_EN.scatter(1, index_EK, -torch.inf)
    return (lowest_E + others_EN.amax(1)) / 2


def may_synchronize(x_N: Tensor) -> bool:
    """Whether the host may read a shape that depends on the data of N tokens.

    Not on a GPU with at most `MAX_UNSYNCHRONIZED_TOKENS` tokens, where waiting for it would cost
    more than empty slots.
    """
    return x_N.device.type != "cuda" or len(x_N) > MAX_UNSYNCHRONIZED_TOKENS


def select_ragged(selected_EN: Tensor, logits_EN: Tensor) -> RaggedSelection:
    """Concatenate the tokens that each expert selected.

    The length T depends on the data, unless the device must not be waited for (`may_synchronize`):
    then every pair of expert and token has a slot, the selected ones first.

    Args:
        logits_EN: main router logits; their sigmoids are the weights.
    """
    end_E = selected_EN.sum(1).cumsum(0, dtype=torch.int32)
    if not may_synchronize(selected_EN[0]):
        order_T = (~selected_EN.flatten()).byte().sort(stable=True).indices
        expert_T, index_T = order_T // selected_EN.shape[1], order_T % selected_EN.shape[1]
        end_E = torch.cat((end_E[:-1], end_E.new_full((1,), len(order_T))))
    else:
        expert_T, index_T = selected_EN.nonzero(as_tuple=True)
    filled_T = selected_EN[expert_T, index_T]
    weight_T = logits_EN[expert_T, index_T].sigmoid() * filled_T
    return RaggedSelection(index_T, expert_T, filled_T, weight_T, end_E)


def select_by_sequence(selected_BS: Tensor, logits_BS: Tensor) -> Selection:
    """Arrange the selected tokens of each sequence in their order, [B, K].

    K is the number of tokens of the sequence with most of them; S, if the device must not be waited
    for (`may_synchronize`).

    Args:
        logits_BS: main router logits; their sigmoids are the weights.
    """
    sequences, length = selected_BS.shape
    may_wait = may_synchronize(selected_BS.flatten())
    num_slots = int(selected_BS.sum(1).max()) if may_wait else length
    if not num_slots:
        index_B0 = torch.zeros_like(logits_BS[:, :0], dtype=torch.int64)
        return Selection(index_B0, selected_BS[:, :0], logits_BS[:, :0])
    first_B1 = torch.arange(sequences, device=selected_BS.device)[:, None] * length
    if num_slots == length == 1:  # while decoding, nothing has to be sorted
        return Selection(first_B1, selected_BS, logits_BS.sigmoid() * selected_BS)
    # Selected tokens first, in order; empty slots have the last index, so that indices increase.
    index_BK = selected_BS.byte().sort(dim=1, descending=True, stable=True).indices[:, :num_slots]
    filled_BK = selected_BS.gather(1, index_BK)
    index_BK = index_BK.where(filled_BK, length - 1)
    weight_BK = logits_BS.gather(1, index_BK).sigmoid() * filled_BK
    return Selection(index_BK + first_B1, filled_BK, weight_BK)


def select_all(eligible_N: Tensor, capacity: int) -> Selection:
    """Select the first K = `capacity` eligible tokens for one expert, with weight 1, [1, K]."""
    number_N = eligible_N.cumsum(0) - 1
    slot_N = torch.where(eligible_N & (number_N < capacity), number_N, capacity)
    # All other tokens go to one more slot, which is cut off: counting is faster than sorting.
    index_K = torch.zeros(capacity + 1, dtype=torch.int64, device=eligible_N.device)
    index_K = index_K.scatter(0, slot_N, torch.arange(len(slot_N), device=slot_N.device))
    filled_EK = (torch.arange(capacity, device=slot_N.device) < eligible_N.sum())[None]
    return Selection(index_K[None, :capacity], filled_EK, filled_EK.float())
