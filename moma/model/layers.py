"""Feed-forward and rotary position embedding: the parts that know nothing of modalities.

Shape suffixes, in every file of this room: B rows, S positions, N = B·S tokens, D width,
F hidden width, E experts of a group, K capacity of an expert, V vocabulary, H heads, C head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def upcast(x: Tensor) -> Tensor:
    """At least fp32: what decides or accumulates is not left to bf16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather(x_ND: Tensor, token_T: Tensor) -> Tensor:
    """The rows of some tokens, [T, D]."""
    return x_ND.gather(0, token_T[:, None].expand(-1, x_ND.shape[1]))


def scatter_add(y_ND: Tensor, token_T: Tensor, z_TD: Tensor) -> Tensor:
    """Rows added to those of some tokens, which may come several times, [N, D].

    Not `index_add`, of this and as the backward of `index_select`: compiled for several threads of
    a CPU, that adds number by number, atomically, and takes ten times as long (torch 2.13).
    """
    return y_ND.scatter_add(0, token_T[:, None].expand(-1, y_ND.shape[1]), z_TD)


class SwiGLU(nn.Module):
    """Feed-forward with a gated hidden layer: down(SiLU(gate(x)) · up(x)).

    Source: Shazeer 2020 (arXiv 2002.05202); the paper's FFN_SwiGLU (MoMa §2.2).
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.down(functional.silu(self.gate(x_ND)) * self.up(x_ND))


def rotary_angles(positions_BS: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each [B, S, 1, C/2] in fp32.

    Source: RoFormer (arXiv 2104.09864), with theta 10,000 in Chameleon.
    """
    exponents = torch.arange(0, head_width, 2, device=positions_BS.device) / head_width
    angles = positions_BS[..., None, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x_BSHC: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embedding in the half-split layout: (first, second) half of C are the pairs."""
    cosine, sine = angles
    first, second = upcast(x_BSHC).chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return rotated.to(x_BSHC.dtype)
