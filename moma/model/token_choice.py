"""Token choice: each token takes the experts of its group that it scores highest.

    loss-free balancing (arXiv 2408.15664):  s = sigmoid(x · W),  Top-k of s + b,  weight s
    null experts (arXiv 2601.15370):         s = softmax(x · W),  Top-k of s over real and null
                                             experts,  weight s / Σ s over the real ones taken

Whether an expert processes a token depends on this token only, so inference is causal. Training has
static capacity: an expert drops the tokens with its lowest scores beyond its slots. The biases b
serve selection only; `TokenRouter.update_bias` moves them after each step.

Shapes: see `experts.py`; Q real and null experts of a group, O outputs of its router: one for each
real expert, and one that all null experts share.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moma.model.experts import ExpertGroup
from moma.model.groups import TokenChoiceConfig
from moma.model.routers import Diagnostics, diagnose
from moma.model.routing import (
    Noisy,
    RaggedSelection,
    Routing,
    Selection,
    logistic_noise,
    router_logits,
    select_ragged,
    select_top_k,
)


class TokenChoices(NamedTuple):
    """What the tokens of a group took, before an expert drops any.

    Attributes:
        taken_NE: whether token n took the real expert e.
        logits_NE: logits of the scores: their sigmoids are its scores of the real experts.
        weight_NE: weights of the experts' outputs, valid where the expert was taken.
        load_O: number of tokens that took each real expert, and a null expert on average, in fp32.
        loss: the weighted load balancing loss; None without.
    """

    taken_NE: Tensor
    logits_NE: Tensor
    weight_NE: Tensor
    load_O: Tensor
    loss: Tensor | None


class TokenRouter(nn.Linear):
    """The router of a group under token choice, with a bias of each output for selection only.

    Args:
        dim: width D.
        experts: number of real experts E.
        config: see `TokenChoiceConfig`.

    Attributes:
        bias_O: added to the scores for selection.
    """

    bias_O: Tensor

    def __init__(self, dim: int, experts: int, config: TokenChoiceConfig):
        outputs = config.router_outputs(experts)
        super().__init__(dim, outputs, bias=False)
        self.experts, self.null_experts = experts, config.null_experts(experts)
        self.config = config
        self.register_buffer("bias_O", torch.zeros(outputs, dtype=torch.float32))

    def choose(self, x_ND: Tensor, eligible_N: Tensor, noise: bool) -> TokenChoices:
        """Let each eligible token take its experts.

        Args:
            x_ND: tokens of all modalities.
            eligible_N: the tokens of the group's modalities.
            noise: whether to add Gumbel-Sigmoid noise to the logits; see `logistic_noise`.
        """
        logits_NO = router_logits(self.weight, x_ND)
        if noise:
            logits_NO = logits_NO + logistic_noise(logits_NO)
        logits_NQ = self._expand(logits_NO)
        score_NQ = logits_NQ.softmax(1) if self.null_experts else logits_NQ.sigmoid()
        biased_NQ = score_NQ.detach() + self._expand(self.bias_O)
        index_Nk = biased_NQ.topk(self.config.top_k, dim=1).indices
        taken_NQ = torch.zeros_like(score_NQ, dtype=torch.bool).scatter(1, index_Nk, True)
        taken_NQ = taken_NQ & eligible_N[:, None]
        loss = self._balance_loss(score_NQ, taken_NQ, eligible_N)
        taken_NE, score_NE = taken_NQ[:, : self.experts], score_NQ[:, : self.experts]
        load_O = taken_NE.sum(0).float()
        if not self.null_experts:
            return TokenChoices(taken_NE, logits_NO, score_NE, load_O, loss)
        null_1 = taken_NQ[:, self.experts :].sum()[None] / self.null_experts
        weight_NE = score_NE * taken_NE
        total_N1 = weight_NE.sum(1, keepdim=True)
        weight_NE = weight_NE / total_N1.where(total_N1 > 0, 1)
        logits_NE = score_NE.logit(eps=1e-7)
        return TokenChoices(taken_NE, logits_NE, weight_NE, torch.cat((load_O, null_1)), loss)

    def _expand(self, x_NO: Tensor) -> Tensor:
        """Repeat the last of [..., O] for each null expert, to [..., Q]."""
        if self.null_experts < 2:
            return x_NO
        return torch.cat((x_NO, *[x_NO[..., -1:]] * (self.null_experts - 1)), -1)

    def _balance_loss(
        self, score_NQ: Tensor, taken_NQ: Tensor, eligible_N: Tensor
    ) -> Tensor | None:
        if not self.config.balance_loss:
            return None
        tokens = eligible_N.sum().clamp(min=1)
        fraction_Q = taken_NQ.sum(0) / (tokens * self.config.top_k)
        share_NQ = score_NQ / score_NQ.sum(1, keepdim=True) * eligible_N[:, None]
        balance = len(fraction_Q) * (fraction_Q * share_NQ.sum(0) / tokens).sum()
        return self.config.balance_loss * balance

    def update_bias(self, load_O: Tensor) -> None:
        """Raise the bias of outputs with less than the mean load, and lower that of the others.

        Args:
            load_O: the load of a step; see `TokenChoices`.
        """
        total = load_O[: self.experts].sum() + self.null_experts * load_O[self.experts :].sum()
        mean = total / (self.experts + self.null_experts)
        self.bias_O += self.config.bias_rate * (mean - load_O).sign()


class TokenChoiceGroup(ExpertGroup):
    """A group of several experts whose tokens take experts.

    Args:
        config: see `TokenChoiceConfig`.
        stack: the arguments of `ExpertGroup`.
    """

    router: TokenRouter  # type: ignore[assignment]

    def __init__(self, config: TokenChoiceConfig, *stack: Any):
        self._config = config  # before `add_routers` is called
        super().__init__(*stack)

    def add_routers(self, dim: int) -> None:
        """Create the router; there is nothing that an auxiliary router would have to predict."""
        self.router = TokenRouter(dim, self.num_experts, self._config)

    def is_ragged(self, routing: Routing) -> bool:
        """Slots, and dropped tokens, exist only under the static capacity of training."""
        return routing.experts.capacity_mode != "static"

    def _select(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[Selection, list[Diagnostics]]:
        choices = self.router.choose(x_ND, eligible_N, self.noise and self.training)
        taken_EN, weight_EN = choices.taken_NE.T, choices.weight_NE.T
        num_slots = self._num_slots(eligible_N, "static")
        selection = select_top_k(choices.logits_NE.T, taken_EN, num_slots)
        weight_EK = weight_EN.gather(1, selection.index_EK) * selection.filled_EK
        selection = selection._replace(weight_EK=weight_EK)
        selected_NE = selection.selected_NE(len(x_ND)) if routing.records else None
        excess = taken_EN.sum() - selection.filled_EK.sum()
        return selection, [
            diagnose(
                selected_NE,
                choices.logits_NE,
                None,
                eligible_N,
                routing,
                excess=excess,
                token_choice_weight_NE=choices.weight_NE,
                load_O=choices.load_O,
                loss=choices.loss,
            )
        ]

    def _select_ragged(
        self, x_ND: Tensor, eligible_N: Tensor, routing: Routing
    ) -> tuple[RaggedSelection, list[Diagnostics]]:
        if isinstance(routing.experts, Noisy):
            raise ValueError(
                "token choice has no decisions of experts to invert; use Noisy for depth"
            )
        choices = self.router.choose(x_ND, eligible_N, False)
        tokens = select_ragged(choices.taken_NE.T, choices.logits_NE.T)
        weight_T = choices.weight_NE[tokens.index_T, tokens.expert_T] * tokens.filled_T
        selected_NE = choices.taken_NE.to(choices.logits_NE.dtype) if routing.records else None
        return tokens._replace(weight_T=weight_T), [
            diagnose(
                selected_NE,
                choices.logits_NE,
                None,
                eligible_N,
                routing,
                token_choice_weight_NE=choices.weight_NE,
            )
        ]
