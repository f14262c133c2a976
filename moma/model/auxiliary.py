"""Auxiliary routers tell from one token alone what the batch would choose (MoMa §2.4)."""

from typing import NamedTuple

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


class RouterRecord(NamedTuple):
    """What one router did in a forward pass, returned as an output so that it can be trained on.

    Attributes:
        chosen_NE: 1 where the batch choice gave token n to expert e, else 0.
        likelihood_NE: the auxiliary router's logits for the same.
        eligible_N: the tokens that the router had to choose from.
    """

    chosen_NE: Tensor
    likelihood_NE: Tensor
    eligible_N: Tensor
