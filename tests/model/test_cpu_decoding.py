"""Operations of cached passes on a CPU; `test_caches.py` compares whole passes."""

import pytest
import torch
from torch import nn

from moma.model.cpu_decoding import _add_normalized


@pytest.mark.parametrize("eps", [None, 0.0, 1e-5, 0.5])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 3.0, 1e20])
@torch.no_grad()
def test_adding_a_normalized_row_equals_the_norm(eps, scale):
    x_ND, y_ND = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(1))
    norm = nn.RMSNorm(24, eps)
    norm.weight.copy_(torch.linspace(-1, 2, 24))
    expected_ND = x_ND + norm(scale * y_ND)
    found_ND = _add_normalized(x_ND, scale * y_ND, norm)
    torch.testing.assert_close(found_ND, expected_ND, equal_nan=True)
