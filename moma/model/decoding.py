"""The fastest way to compute passes with caches on a device."""

import torch

from moma.model.captured_decoding import CapturedDecoder, CudaGraphs
from moma.model.cpu_decoding import CpuDecoder
from moma.model.experts import ExpertGroup
from moma.model.grouped import reads_ends_on_device
from moma.model.transformer import Transformer


def prepare_decoding(model: Transformer, graphs: bool = True) -> None:
    """Let a model that is not trained any more decode as fast as its device permits.

    On a CPU in fp32 it uses `CpuDecoder`, on a GPU `CapturedDecoder` if `can_be_captured`. From now
    on it must stay on its device, in its dtype.

    Args:
        graphs: whether it may use CUDA graphs.
    """
    weight = model.embedding.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        model.cpu_decoder = CpuDecoder(model)
    elif graphs and weight.device.type == "cuda" and can_be_captured(model):
        model.captured_decoder = CapturedDecoder(
            CudaGraphs(weight.device), model.vocabulary.padding
        )


def can_be_captured(model: Transformer) -> bool:
    """Whether a GPU computes a pass over few tokens without waiting for it.

    Dense models do; experts only if their products need not know on the host how many tokens each
    expert has. AMD's GPUs are left out: nothing was tested there.
    """
    if torch.version.hip is not None:
        return False
    groups = (module for module in model.modules() if isinstance(module, ExpertGroup))
    return all(
        reads_ends_on_device(down_EFD[0], gate_EDF)
        for gate_EDF, _, down_EFD in (group.matrices() for group in groups)
    )
