"""Who takes which token: one `Selection`, filled by batch choice or by causal choice.

Batch choice is how the model trains: every expert takes the tokens it scores highest in the whole
batch (expert choice, MoMa §2.2). It looks at the future, so it cannot generate. Causal choice
decides each token by itself, from the auxiliary routers' likelihoods (§2.4).

Shapes: see `layers.py`; E are the experts of one group, K the slots of an expert.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moma.model.layers import upcast

RoutingName = Literal["choice", "causal"]
CapacityName = Literal["static", "actual"]

# Up to so many, a router's logits are products with a vector.
_FEW_EXPERTS = 16


@dataclass(frozen=True)
class Routing:
    """How a forward pass routes its tokens.

    Attributes:
        mode: `choice` takes the best tokens of the batch; `causal` asks the auxiliary routers.
        capacity: slots of an expert under `choice`. `static` follows the recipe's modality shares,
            so that every shape is known beforehand; `actual` counts the batch's own tokens.
        record_auxiliary: whether records hold the auxiliary logits too, to be trained on.
        record_selection: whether routers record which tokens were selected; nearly free.
    """

    mode: RoutingName = "choice"
    capacity: CapacityName = "static"
    record_auxiliary: bool = False
    record_selection: bool = False

    @property
    def reported(self) -> bool:
        """Whether routers report at all."""
        return self.record_auxiliary or self.record_selection


class Selection(NamedTuple):
    """The tokens that each expert takes.

    Attributes:
        token_EK: int64 index into the N tokens for each slot.
        filled_EK: whether the slot holds a token; an expert may have more slots than tokens.
        score_EK: factor of the expert's output; exactly 0 in an empty slot, so that what is
            computed there adds nothing and gets no gradient.
    """

    token_EK: Tensor
    filled_EK: Tensor
    score_EK: Tensor

    def selected_NE(self, tokens: int) -> Tensor:
        """Whether token n is taken by expert e, as zeros and ones of shape [N, E]."""
        nobody = self.score_EK.new_zeros(len(self.token_EK), tokens)
        return nobody.scatter_add(1, self.token_EK, self.filled_EK.to(nobody.dtype)).T


def router_logits(weight_ED: Tensor, x_ND: Tensor) -> Tensor:
    """Logits of a main router, in fp32 whatever the rest is in: rounded ones would tie.

    Args:
        weight_ED: of each expert; of a gate, one row.
        x_ND: tokens.

    Returns:
        [N, E], which lies in memory expert by expert, as choices go through it.
    """
    with torch.autocast(x_ND.device.type, enabled=False):
        if len(weight_ED) > _FEW_EXPERTS:
            return functional.linear(upcast(x_ND), upcast(weight_ED))
        return _LogitsOfFew.apply(upcast(x_ND), upcast(weight_ED)).T


class _LogitsOfFew(torch.autograd.Function):
    """W · xᵀ, [E, N], one expert at a time.

    Compiled, products with a vector and sums of outer products run in what else goes through the
    tokens; as matrices of few rows they are products of their own, and take longer
    (docs/results/layer.md). Of the three only the weight's gradient is better off as one.
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
    # The small slack keeps a product such as 0.3 · 10 from being rounded up.
    return math.ceil(share * tokens / experts - 1e-6)


def logistic_noise(logits_NE: Tensor) -> Tensor:
    """Noise of Gumbel-Sigmoid, sigmoid(z + G′ − G″), for logits z (MoMa §2.5, Equation 5).

    The difference of two independent Gumbel(0, 1) draws is logistic, which is log(u / (1 − u)) of
    one uniform draw. PyTorch's generator draws, so its seed and state decide.
    """
    return torch.rand_like(logits_NE).logit(eps=1e-7)


def any_nonfinite(logits_NE: Tensor, eligible_N: Tensor) -> Tensor:
    """Whether an eligible token has a score that is NaN or infinite: a boolean on the device.

    A NaN would win every choice, so it is told apart and stops the run later, without a wait here.
    """
    return (~logits_NE.detach().isfinite().all(1) & eligible_N).any()


def expert_choice(logits_NE: Tensor, eligible_N: Tensor, capacity: int) -> Selection:
    """Expert choice: each expert takes its `capacity` highest-scored eligible tokens (Eq. 1).

    Args:
        logits_NE: router logits z; the score of a token is sigmoid(z).
        eligible_N: whether a token belongs to the group's modalities and is no padding.
        capacity: slots an expert has, K; slots beyond the eligible tokens stay empty.
    """
    return select_top_k(logits_NE.T, eligible_N.expand(logits_NE.shape[1], -1), capacity)


def select_top_k(logits_EN: Tensor, eligible_EN: Tensor, capacity: int) -> Selection:
    """As `expert_choice`, each line of E choosing among N tokens of its own."""
    masked_EN = logits_EN.detach().masked_fill(~eligible_EN, -torch.inf)
    token_EK = masked_EN.topk(min(capacity, logits_EN.shape[1]), dim=1).indices
    filled_EK = eligible_EN.gather(1, token_EK)
    return Selection(token_EK, filled_EK, logits_EN.gather(1, token_EK).sigmoid() * filled_EK)


def causal_choice(logits_NE: Tensor, auxiliary_logits_NE: Tensor, eligible_N: Tensor) -> Selection:
    """Causal choice: expert e takes token n iff its likelihood is above one half (§2.4).

    The number of slots is what the busiest expert needs, so the shape depends on the data: this
    is for inference, not for compiled training.

    Args:
        logits_NE: main router logits, which give the weight alone.
        auxiliary_logits_NE: the auxiliary router's logits; above 0 is a likelihood above 0.5.
        eligible_N: as for `expert_choice`.
    """
    chosen_EN = ((auxiliary_logits_NE > 0) & eligible_N[:, None]).T
    capacity = int(chosen_EN.sum(1).max())
    # Taken tokens first, in order; what follows them are the empty slots.
    token_EK = chosen_EN.byte().sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    filled_EK = chosen_EN.gather(1, token_EK)
    return Selection(token_EK, filled_EK, logits_NE.T.gather(1, token_EK).sigmoid() * filled_EK)


def select_all(eligible_N: Tensor, capacity: int) -> Selection:
    """A group of one expert takes every eligible token with weight 1: it needs no router."""
    taken_N, token_N = eligible_N.byte().sort(descending=True, stable=True)
    filled_EK = taken_N[None, :capacity].bool()
    return Selection(token_N[None, :capacity], filled_EK, filled_EK.float())
