"""The device and the ranks of a job, from one CPU to many nodes."""

import os
import shutil
import socket
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moma.errors import (
    LostRankError,
    SharedError,
    SharedStorageError,
    StorageError,
    UserError,
    to_user_error,
)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The device and the rank of this process.

    Attributes:
        device: on which this process computes.
        rank, size: number of this process, from 0, and how many there are.
        mesh: one-dimensional mesh of all ranks; None for a single process.
        writers: all ranks in a second group, on gloo, for the thread that writes checkpoints.
        signals: all ranks in a third group, for `Interruption`.
        nodes: number of machines.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    writers: ProcessGroup | None = None
    signals: ProcessGroup | None = None
    nodes: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place, without synchronizing with the host."""
        if self.mesh is not None:
            distributed.all_reduce(values, group=self.mesh.get_group())
        return values

    def sum_each(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sum several tensors over all ranks in one reduction, in the dtype that holds them all."""
        if not values:
            return []
        total = self.sum(torch.cat([each.flatten() for each in values]))
        parts = total.split([each.numel() for each in values])
        return [part.view_as(each) for part, each in zip(parts, values, strict=True)]

    def join(self, values: Tensor) -> Tensor:
        """Concatenate a tensor of all ranks, of equal shapes, along the first dimension.

        A gradient reaches this rank's part only.
        """
        if self.mesh is None:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(parts, values.detach().contiguous(), group=self.mesh.get_group())
        parts[self.rank] = values
        return torch.cat(parts)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of replicated parameters over all ranks."""
        gradients = [each.grad for each in parameters if each.grad is not None]
        if self.mesh is not None:
            for gradient, total in zip(gradients, self.sum_each(gradients), strict=True):
                gradient.copy_(total)

    def barrier(self) -> None:
        """Wait until every rank calls this."""
        if self.mesh is not None:
            distributed.barrier(group=self.mesh.get_group())


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works: on a CPU it needs a C++ compiler and Python's headers.

    On a CPU, layers compiled by PyTorch 2.11 compute wrong gradients of their inputs; compiled by
    2.13 they do not (tests/model/test_implementations.py).
    """
    if device.type != "cpu":
        return True
    if not compiles_right_for_cpus():
        return False
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.is_file() and shutil.which(os.environ.get("CXX", "g++")) is not None


def compiles_right_for_cpus() -> bool:
    """Whether this version of PyTorch is known to compile layers for a CPU without errors."""
    return torch.__version__ >= "2.13"


def local_device() -> torch.device:
    """The GPU of this rank, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
    return torch.device("cpu")


def gather(value: T, group: ProcessGroup | None) -> list[T]:
    """The values of all ranks in rank order; without a group, only this rank's."""
    if group is None:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


@contextmanager
def raise_on_all_ranks(world: World, while_writing: bool = False) -> Iterator[None]:
    """Raise a `UserError` of any rank on all ranks, as `SharedError`; every rank has to enter.

    Args:
        while_writing: whether a checkpoint may be being written in the background, which uses
            the group of writers.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    except OSError as error:
        problem = to_user_error(error)
        if problem is None:
            raise
    own = problem and (isinstance(problem, StorageError), str(problem))
    group = world.mesh.get_group() if while_writing and world.mesh else world.writers
    problems = [each for each in gather(own, group) if each]
    if problems:
        is_storage, message = problems[0]
        raise (SharedStorageError if is_storage else SharedError)(message) from problem


def on_rank_0(world: World, function: Callable[..., object], *arguments: object) -> None:
    """Call a function on rank 0 only; its error is raised on all ranks (`raise_on_all_ranks`)."""
    with raise_on_all_ranks(world):
        if world.rank == 0:
            function(*arguments)


def from_rank_0(world: World, function: Callable[..., T], *arguments: object) -> T:
    """Return what a function returns on rank 0, where alone it is called, on all ranks."""
    with raise_on_all_ranks(world):
        own = function(*arguments) if world.rank == 0 else None
    value: Any = gather(own, world.writers)[0]
    return value


@contextmanager
def reporting_lost_ranks(world: World) -> Iterator[None]:
    """Raise a `LostRankError` if another rank ended, or did not respond in time."""
    try:
        yield
    except RuntimeError as error:
        message = str(error).strip()
        is_communication = isinstance(error, distributed.DistError) or any(
            word in message for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer")
        )
        if world.mesh is None or not is_communication:
            raise
        cause = message.splitlines()[0] if message else type(error).__name__
        lost = f"rank {1 - world.rank}" if world.size == 2 else "another rank"
        raise LostRankError(
            f"rank {world.rank} of {world.size}: lost {lost} ({cause}); restart the job, which "
            "resumes from its last checkpoint"
        ) from error


@contextmanager
def join_world(timeout: float = 600) -> Iterator[World]:
    """Join the job that torchrun or Slurm describes in the environment, if there is one.

    A rank that does not respond within `timeout` seconds counts as lost.

    Raises:
        UserError: a variable of the environment that describes the job is missing or wrong.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT") if os.environ.get("WORLD_SIZE") else ()
    numbers = {name: os.environ.get(name, "") for name in names}
    for name, value in numbers.items():
        if not (value.isascii() and value.isdigit()):
            raise UserError(
                f"{name}={value!a} in the environment: set it as torchrun does, or "
                "unset WORLD_SIZE to train in one process"
            )
    if numbers and not int(numbers["RANK"]) < int(numbers["WORLD_SIZE"]):
        raise UserError(
            f"RANK={numbers['RANK']} in the environment: must be below WORLD_SIZE="
            f"{numbers['WORLD_SIZE']}"
        )
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not numbers:
        yield World(device)
        return
    wait = timedelta(seconds=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=wait)
    try:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        writers, signals = (distributed.new_group(backend="gloo", timeout=wait) for _ in range(2))
        nodes = len(set(gather(socket.gethostname(), writers)))
        mesh = init_device_mesh(device.type, (size,))
        yield World(device, rank, size, mesh, writers, signals, nodes)
    except BaseException:
        # Leaving in order would wait for operations on the device that a lost rank never joins.
        with suppress(RuntimeError, ValueError):  # the first error is the one to report
            distributed_c10d._abort_process_group()
        raise
    distributed.destroy_process_group()
