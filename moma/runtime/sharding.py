"""Fully sharded data parallelism over the units that a model offers (MoMa §3: FSDP, all ranks)."""

from collections.abc import Iterable
from typing import Literal

import torch
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
    """How a job uses its machines; the recipe of the model is the same on all.

    Attributes:
        compute: what products are computed in; left out, bf16 on a GPU and fp32 on a CPU.
            Weights, optimizer and router scores are fp32 always.
        reduce: what gradients are added up in between ranks.
        replicate: copies of the sharded model: 1 shards it over all ranks; with more, each copy
            is sharded over a part of the ranks, a node, say, and gradients are added up between
            copies (hybrid sharding).
        recompute: activations that are computed again instead of kept for the backward pass:
            `none`, a whole `layer`'s, or `selective`: all but products and choices.
        step_size: what becomes of a step when a run goes on with another number of ranks: it is
            `kept`, its micro-batches shared out anew, or `grows` with them, each rank having the
            stage's `gradient_accumulation_steps`.
        timeout: seconds after which a rank that does not answer is taken for lost.
        trace: so many steps after the program has begun, the first rank traces three; 0: none.
    """

    compute: DTypeName | None = None
    reduce: DTypeName = "fp32"
    replicate: int = Field(1, ge=1)
    recompute: Recompute = "none"
    step_size: Literal["kept", "grows"] = "kept"
    timeout: float = Field(600, gt=0)
    trace: int = Field(0, ge=0)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What products are computed in on a device."""
        default: DTypeName = "bf16" if device.type == "cuda" else "fp32"
        return DTYPES[self.compute or default]


def shard(
    model: nn.Module,
    units: Iterable[nn.Module],
    world: World,
    config: EngineConfig = EngineConfig(),  # noqa: B008  frozen
) -> None:
    """Shard each unit, then what is left of the model, over all ranks; a world of one stays whole.

    Args:
        model: is changed in place.
        units: parts whose weights are gathered one by one; inner ones before those around them.
        world: the ranks.
        config: precision, and whether the model is replicated.

    Raises:
        UserError: the ranks cannot be divided between so many copies.
    """
    if world.size % config.replicate:
        raise UserError(
            f"engine.replicate: {world.size} ranks cannot hold {config.replicate} copies of equal "
            "size; choose a divisor"
        )
    if world.mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=config.compute_dtype(world.device),
        reduce_dtype=DTYPES[config.reduce],
        # Activations are of that type by themselves; rotary angles have to stay fp32.
        cast_forward_inputs=False,
    )
    mesh = _mesh(world, config)
    ranks = world.size // config.replicate

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dimension(parameter, ranks))

    for module in (*units, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    if world.device.type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo cannot scale inside a reduction.
                module.set_force_sum_reduction_for_comms(True)


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy a rank's own part of whole values into its part of a parameter; all, if it is whole.

    Args:
        parameter: sharded or whole.
        values: of the whole parameter; may be a view.
    """
    if not isinstance(parameter, DTensor):
        parameter.copy_(values)
        return
    mesh = parameter.device_mesh
    for number, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            parts = values.chunk(mesh.size(number), placement.dim)
            own = mesh.get_local_rank(number)
            # Behind the last part there are ranks that hold nothing.
            values = parts[own] if own < len(parts) else values.narrow(placement.dim, 0, 0)
    parameter.to_local().copy_(values)


def _mesh(world: World, config: EngineConfig) -> DeviceMesh:
    """All ranks in one dimension, or copies × ranks of a copy."""
    assert world.mesh is not None
    if config.replicate == 1:
        return world.mesh
    shape = (config.replicate, world.size // config.replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard_dimension(parameter: Tensor, ranks: int) -> int:
    """The dimension that is cut between ranks.

    Stacked experts [E, in, out] are cut along a width that the ranks divide, which sharding asks
    of any dimension but the first: E may be smaller than the world.
    """
    if parameter.ndim < 3:
        return 0
    return next((width for width in (1, 2) if parameter.shape[width] % ranks == 0), 0)
