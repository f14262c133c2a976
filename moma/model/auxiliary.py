"""Auxiliary routers tell from one token alone what the batch would choose (MoMa §2.4)."""

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional


class AuxiliaryRouter(nn.Module):
    """Logits of a(x) = sigmoid(SiLU(x · A1) · A2), Equations 3 and 4; A1: d × d/2, A2: d/2 × E."""

    def __init__(self, dim: int, choices: int):
        super().__init__()
        self.hidden = nn.Linear(dim, dim // 2, bias=False)
        self.output = nn.Linear(dim // 2, choices, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [N, D] to logits [N, E]."""
        return self.output(functional.silu(self.hidden(x_ND)))


class RouterOutput(NamedTuple):
    """What one router did in a forward pass, returned as an output so that it can be trained on.

    Attributes:
        selected_NE: 1 where the batch choice gave token n to expert e, else 0.
        auxiliary_logits_NE: the auxiliary router's logits for the same, if they were asked for.
        eligible_N: the tokens that the router had to choose from.
        logits_NE: the main router's logits.
        kind: whether experts chose (E of them) or a whole layer did (E = 1).
    """

    selected_NE: Tensor
    auxiliary_logits_NE: Tensor | None
    eligible_N: Tensor
    logits_NE: Tensor
    kind: Literal["experts", "depth"] = "experts"

    def spread(self, token_K: Tensor, tokens: int) -> "RouterOutput":
        """The record of a router that met only the tokens `token_K`, as one over all N tokens."""

        def over_all(part: Tensor) -> Tensor:
            return part.new_zeros(tokens, *part.shape[1:]).index_copy(0, token_K, part)

        return self._replace(
            selected_NE=over_all(self.selected_NE),
            auxiliary_logits_NE=None
            if self.auxiliary_logits_NE is None
            else over_all(self.auxiliary_logits_NE),
            eligible_N=over_all(self.eligible_N),
            logits_NE=over_all(self.logits_NE),
        )


class Diagnostics(NamedTuple):
    """What a router tells of a forward pass, besides its selection; or a layer of its output.

    Attributes:
        nonfinite: a boolean on the device: whether a score, or the output, was NaN or infinite.
        record: what it did, if it was asked to record.
    """

    nonfinite: Tensor
    record: RouterOutput | None
