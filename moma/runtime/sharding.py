"""Fully sharded data parallelism over the units that a model offers (MoMa §3: FSDP, all ranks)."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moma.runtime.world import World


def shard(model: nn.Module, units: Iterable[nn.Module], world: World) -> None:
    """Shard each unit, then what is left of the model, over all ranks; a world of one stays whole.

    On a GPU the units compute in bf16 and reduce their gradients in fp32.
    """
    if world.mesh is None:
        return
    policy = MixedPrecisionPolicy()
    if world.device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*units, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy, shard_placement_fn=_shard_dimension)
    if world.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo cannot scale inside a reduction.
                module.set_force_sum_reduction_for_comms(True)


def _shard_dimension(parameter: nn.Parameter) -> Shard:
    """Stacked experts [E, in, out] are cut along `in`: E may be smaller than the world."""
    return Shard(1 if parameter.ndim == 3 else 0)
