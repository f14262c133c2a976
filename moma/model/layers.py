"""SwiGLU, rotary embedding and gathering: the building blocks that do not depend on modalities.

Shape suffixes in all of `moma.model`: B sequences of a micro-batch, S positions, N = B·S tokens,
D width, F hidden width, E experts of a group, K slots of an expert (its capacity), T flattened
slots, R rows that select independently, V vocabulary size, H heads, C head width, L layers,
M modalities.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def upcast(x: Tensor) -> Tensor:
    """Convert to at least fp32, for decisions and accumulation."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of a tensor are computed: that of autocast, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def gather(x_ND: Tensor, index_T: Tensor) -> Tensor:
    """Return the vectors of the given tokens, [T, D]."""
    return x_ND.gather(0, index_T[:, None].expand(-1, x_ND.shape[1]))


def scatter_add(y_ND: Tensor, index_T: Tensor, z_TD: Tensor) -> Tensor:
    """Add vectors to those of the given tokens, which may repeat; [N, D].

    `index_add`, also as the backward of `index_select`, is ten times slower when compiled for
    several CPU threads, because it adds each number atomically (torch 2.13).
    """
    return y_ND.scatter_add(0, index_T[:, None].expand(-1, y_ND.shape[1]), z_TD)


class SwiGLU(nn.Module):
    """Gated feed-forward, down(SiLU(gate(x)) · up(x)) (arXiv 2002.05202; FFN_SwiGLU, MoMa §2.2)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.down(functional.silu(self.gate(x_ND)) * self.up(x_ND))


def rotary_cos_sin(positions_BS: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles, each [B, S, 1, C/2] in fp32.

    Source: RoFormer (arXiv 2104.09864); Chameleon uses theta = 10,000.
    """
    exponents = torch.arange(0, head_width, 2, device=positions_BS.device) / head_width
    angles = positions_BS[..., None, None].float() * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x_BSHC: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embedding, pairing the first half of C with the second (half-split layout)."""
    cosine, sine = rotary
    first, second = upcast(x_BSHC).chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return rotated.to(x_BSHC.dtype)
