"""What a process knows of its device."""

import torch
from torch.torch_version import TorchVersion

from moma.runtime.world import can_compile
from tests.command_line import moma


def test_nothing_is_compiled_for_a_cpu_by_a_pytorch_that_computes_wrong_gradients(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cpu"))
    assert not can_compile(torch.device("cpu"))
    assert can_compile(torch.device("cuda"))
    if not torch.cuda.is_available():
        assert "pip install 'torch>=2.13'" in moma("doctor").out
