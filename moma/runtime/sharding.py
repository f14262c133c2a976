"""Fully sharded data parallelism over all ranks (MoMa §3), with FSDP2."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moma.errors import UserError
from moma.recipe import Config
from moma.runtime.recompute import Recompute
from moma.runtime.world import World

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DTypeName = Literal["bf16", "fp32"]


class EngineConfig(Config):
    """How a job uses its machines.

    Attributes:
        compute: dtype of matrix products; by default bf16 on a GPU and fp32 on a CPU. Weights,
            optimizer state and router logits are always fp32.
        float8: whether to compute the products of attention and experts in float8, those of linear
            layers by torchao; `emulate` only rounds to float8, on any device. Routers, the head and
            the gradients of the weights of experts stay in `compute`, and so do evaluation and
            generation.
        reduce: dtype in which gradients are summed over ranks; by default bf16 in a job on several
            machines, whose network is slow, and fp32 on one.
        reduce_once: whether gradients are summed over ranks once per step, instead of after each
            micro-batch of `gradient_accumulation_steps`; a rank then holds all of them unsharded,
            in fp32 for any `reduce`.
        deterministic: whether training on a GPU avoids flash attention, whose backward pass adds in
            an order that changes from run to run; `flex_attention` takes its place.
        replicate: number of replicas of the sharded model. 1 shards it over all ranks; with more,
            each replica is sharded over a part of the ranks, for example a node, and gradients
            are summed over replicas (hybrid sharding).
        recompute: activations that are recomputed in the backward pass instead of saved: `none`,
            those of a whole `layer`, or `selective`: all but matrix products and top-k choices.
        global_batch_size: what happens to the tokens of a step when a run resumes on another number
            of ranks: `kept` divides the step's micro-batches among the ranks, `grows` gives each
            rank the stage's `gradient_accumulation_steps`.
        timeout: seconds after which a rank that does not respond counts as lost.
        trace: steps after the start of the program at which rank 0 traces three steps; 0: none.
    """

    compute: DTypeName | None = None
    float8: Literal["off", "on", "emulate"] = "off"
    reduce: DTypeName | None = None
    deterministic: bool = False
    replicate: int = Field(1, ge=1)
    reduce_once: bool = True
    recompute: Recompute = "none"
    global_batch_size: Literal["kept", "grows"] = "kept"
    timeout: float = Field(600, gt=0, le=10**7)
    trace: int = Field(0, ge=0)

    def reduce_dtype(self, nodes: int) -> torch.dtype:
        """The dtype in which gradients are summed over the ranks of a number of machines."""
        default: DTypeName = "bf16" if nodes > 1 else "fp32"
        return DTYPES[self.reduce or default]

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of matrix products on a device."""
        default: DTypeName = "bf16" if device.type == "cuda" else "fp32"
        return DTYPES[self.compute or default]


def shard(
    model: nn.Module,
    units: Iterable[nn.Module],
    world: World,
    config: EngineConfig = EngineConfig(),  # noqa: B008  frozen
    exact: Sequence[nn.Module] = (),
) -> None:
    """Shard each unit, then the rest of the model, over all ranks; a single process does not shard.

    Args:
        model: is changed in place.
        units: modules whose weights are gathered one by one; inner modules before outer ones.
        config: dtypes, and the number of replicas, which has to divide the number of ranks.
        exact: small modules whose weights stay fp32 in any `config.compute`. They are gathered
            together at the start of a forward pass, and need not be called.

    Raises:
        UserError: the number of ranks is not a multiple of the number of replicas.
    """
    mesh = _replicated_mesh(world, config.replicate)
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=config.compute_dtype(world.device),
        reduce_dtype=torch.float32,  # in which gradients of several micro-batches are accumulated
        # Activations have that dtype already; rotary angles must stay fp32.
        cast_forward_inputs=False,
    )
    shard_weights = partial(fully_shard, mesh=mesh)
    if exact:
        fp32 = replace(policy, param_dtype=torch.float32)
        shard_weights(list(exact), mp_policy=fp32, reshard_after_forward=False)
    for module in (*units, model):
        shard_weights(module, mp_policy=policy)
    for first in exact[:1]:  # it stands for all of them
        assert isinstance(first, FSDPModule)
        # Registered last: FSDP's own hook on the model has to come before.
        model.register_forward_pre_hook(partial(_unshard, first))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if config.reduce_dtype(world.nodes) == torch.bfloat16:
                module.set_custom_reduce_scatter(_ReduceInBf16())  # type: ignore[arg-type]
            if world.device.type == "cpu":
                # gloo has no reduction that scales (PREMUL_SUM).
                module.set_force_sum_reduction_for_comms(True)


def _replicated_mesh(world: World, replicas: int) -> DeviceMesh | None:
    """The mesh of all ranks, with a dimension for replicas if there are several of them."""
    if world.size % replicas:
        raise UserError(
            f"engine.replicate: {world.size} ranks cannot hold {replicas} replicas; choose a "
            "divisor of the number of ranks"
        )
    if world.mesh is None or replicas == 1:
        return world.mesh
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


class _ReduceInBf16:
    """Sums gradients over ranks in bf16 buffers, to which FSDP2 casts them.

    The interface is that of a custom reduce-scatter of FSDP2.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for the gradients of this rank, or for their sum over ranks."""
        return torch.empty(size, dtype=torch.bfloat16, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Sum over ranks."""
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op, group, async_op)


def _unshard(module: FSDPModule, *_: object) -> None:
    """Gather a module's weights, as a hook."""
    module.unshard()


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy this rank's rows of a parameter's full values into it; all of them if not sharded."""
    rows, first = local_rows(parameter)
    rows.copy_(values[first : first + len(rows)])


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's rows of a parameter, and the number of the first one; all if not sharded."""
    first = 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for number, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                # The last shards may be smaller or empty.
                first = mesh.get_local_rank(number) * -(-len(parameter) // mesh.size(number))
    return local_part(parameter), min(first, len(parameter))


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of it if not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
