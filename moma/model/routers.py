"""Main and auxiliary routers, and what they return besides a selection (MoMa §2.2, §2.4).

Shapes: see `layers.py`.
"""

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from moma.model.layers import upcast
from moma.model.routing import Routing, Selection, any_nonfinite

RouterKind = Literal["experts", "depth"]


class AuxiliaryRouter(nn.Module):
    """Predicts expert choice from one token: a(x) = sigmoid(SiLU(x · A1) · A2) (Equations 3, 4).

    Args:
        dim: width D; A1 is D × D/2.
        outputs: number of outputs; A2 is D/2 × outputs.
    """

    def __init__(self, dim: int, outputs: int):
        super().__init__()
        self.hidden = nn.Linear(dim, dim // 2, bias=False)
        self.output = nn.Linear(dim // 2, outputs, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [N, D] to the logits of a(x), [N, E]."""
        return self.output(functional.silu(self.hidden(x_ND)))


class RouterRecord(NamedTuple):
    """What one router computed in a forward pass, returned as an output to train on.

    Attributes:
        selected_NE: 1 where expert e selected token n by expert choice, else 0.
        auxiliary_logits_NE: the auxiliary router's logits, if requested.
        eligible_N: the tokens that the router selected from.
        logits_NE: the main router's logits, detached.
        kind: a router of `experts`, or of mixture-of-depths (`depth`, with E = 1).
    """

    selected_NE: Tensor
    auxiliary_logits_NE: Tensor | None
    eligible_N: Tensor
    logits_NE: Tensor
    kind: RouterKind = "experts"

    def scatter(self, index_K: Tensor, tokens: int) -> "RouterRecord":
        """Expand a record of only the tokens `index_K` to all N tokens, with zeros elsewhere."""

        def expand(part: Tensor) -> Tensor:
            return part.new_zeros(tokens, *part.shape[1:]).index_copy(0, index_K, part)

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


def auxiliary_logits(auxiliary: AuxiliaryRouter, x_ND: Tensor, routing: Routing) -> Tensor | None:
    """Return the logits of an auxiliary router in at least fp32, if `routing` needs them."""
    is_needed = routing.mode == "causal" or routing.record_auxiliary
    return upcast(auxiliary(x_ND)) if is_needed else None


def diagnose(
    selection: Selection | None,
    logits_NE: Tensor,
    auxiliary_logits_NE: Tensor | None,
    eligible_N: Tensor,
    routing: Routing,
    kind: RouterKind = "experts",
) -> Diagnostics:
    """Check a router's scores, and record its selection if `routing` requests it.

    Args:
        selection: what the router selected; None under causal routing, which is never recorded.
        logits_NE, auxiliary_logits_NE, eligible_N, kind: as in `RouterRecord`.
        routing: see `Routing`.
    """
    nonfinite = any_nonfinite(logits_NE, eligible_N)
    if auxiliary_logits_NE is not None:
        nonfinite = nonfinite | any_nonfinite(auxiliary_logits_NE, eligible_N)
    is_recorded = routing.record_auxiliary or routing.record_selection
    if selection is None or routing.mode == "causal" or not is_recorded:
        return Diagnostics(nonfinite)
    selected_NE = selection.selected_NE(len(eligible_N))
    record = RouterRecord(selected_NE, auxiliary_logits_NE, eligible_N, logits_NE.detach(), kind)
    return Diagnostics(nonfinite, record)
