"""Main and auxiliary routers, and what they return besides a selection (MoMa §2.2, §2.4).

Shapes: see `layers.py`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from moma.model.layers import upcast
from moma.model.routing import Routing, Selection, any_nonfinite, causal_choice


class AuxiliaryRouter(nn.Module):
    """Predicts batch choice from a token alone: a(x) = sigmoid(SiLU(x · A1) · A2), Eq. 3 and 4.

    Args:
        dim: width D; A1 is D × D/2.
        choices: number of outputs; A2 is D/2 × choices.
    """

    def __init__(self, dim: int, choices: int):
        super().__init__()
        self.hidden = nn.Linear(dim, dim // 2, bias=False)
        self.output = nn.Linear(dim // 2, choices, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [N, D] to the logits of a(x), [N, E]."""
        return self.output(functional.silu(self.hidden(x_ND)))


class RouterRecord(NamedTuple):
    """What one router computed in a forward pass, returned as an output to train on.

    Attributes:
        selected_NE: 1 where expert e selected token n by batch choice, else 0.
        auxiliary_logits_NE: the auxiliary router's logits, if requested.
        eligible_N: the tokens that the router selected from.
        logits_NE: the main router's logits, detached.
        kind: a router of `experts`, or of mixture-of-depths (`depth`, with E = 1).
    """

    selected_NE: Tensor
    auxiliary_logits_NE: Tensor | None
    eligible_N: Tensor
    logits_NE: Tensor
    kind: Literal["experts", "depth"] = "experts"

    def scatter(self, token_K: Tensor, tokens: int) -> "RouterRecord":
        """Expand a record of only the tokens `token_K` to all N tokens, with zeros elsewhere."""

        def expand(part: Tensor) -> Tensor:
            return part.new_zeros(tokens, *part.shape[1:]).index_copy(0, token_K, part)

        auxiliary = self.auxiliary_logits_NE
        return self._replace(
            selected_NE=expand(self.selected_NE),
            auxiliary_logits_NE=None if auxiliary is None else expand(auxiliary),
            eligible_N=expand(self.eligible_N),
            logits_NE=expand(self.logits_NE),
        )


class Diagnostics(NamedTuple):
    """What a router, or a layer's output, reports besides its result.

    Attributes:
        nonfinite: boolean on the device: whether a router's score or the output is NaN or infinite.
        record: the router's record, if requested.
    """

    nonfinite: Tensor
    record: RouterRecord | None = None


def select_tokens(
    x_ND: Tensor,
    logits_NE: Tensor,
    auxiliary: AuxiliaryRouter,
    eligible_N: Tensor,
    routing: Routing,
    batch_choice: Callable[[], Selection],
    kind: Literal["experts", "depth"] = "experts",
) -> tuple[Selection, Diagnostics]:
    """Select tokens, by batch choice or causally, as `routing` requests.

    Args:
        x_ND: tokens.
        logits_NE: the main router's logits.
        auxiliary: the auxiliary router, evaluated only for causal choice or a record.
        eligible_N: the tokens to select from.
        routing: see `Routing`.
        batch_choice: selects the highest-scored tokens of the batch.
        kind: see `RouterRecord`.
    """
    nonfinite, auxiliary_logits_NE = any_nonfinite(logits_NE, eligible_N), None
    if routing.mode == "causal" or routing.record_auxiliary:
        auxiliary_logits_NE = upcast(auxiliary(x_ND))
        nonfinite = nonfinite | any_nonfinite(auxiliary_logits_NE, eligible_N)
    if routing.mode == "causal":
        assert auxiliary_logits_NE is not None
        selection = causal_choice(logits_NE, auxiliary_logits_NE, eligible_N)
        return selection, Diagnostics(nonfinite)
    selection = batch_choice()
    if not (routing.record_auxiliary or routing.record_selection):
        return selection, Diagnostics(nonfinite)
    selected_NE = selection.selected_NE(len(x_ND))
    if kind == "depth":  # a column per sequence, of which at most one selects the token
        selected_NE = selected_NE.sum(1, keepdim=True)
    record = RouterRecord(selected_NE, auxiliary_logits_NE, eligible_N, logits_NE.detach(), kind)
    return selection, Diagnostics(nonfinite, record)
