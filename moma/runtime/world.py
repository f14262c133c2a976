"""The device and the ranks of a job: one code path from one CPU to many nodes."""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moma.errors import (
    LostRankError,
    SharedError,
    SharedStorageError,
    StorageError,
    UserError,
    os_error_message,
)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Where this process runs.

    Attributes:
        device: the device of this rank.
        rank, size: number of this process, and how many there are.
        mesh: one-dimensional mesh of all ranks; None for a single process.
        writers: all ranks once more, on gloo, for the thread that writes checkpoints.
        signals: and once more, for what is told beside the training.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    writers: ProcessGroup | None = None
    signals: ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, without a wait for the host."""
        if self.mesh is not None:
            distributed.all_reduce(values, group=self.mesh.get_group())
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.mesh is not None:
            distributed.barrier(group=self.mesh.get_group())


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can work here: a CPU needs a C++ compiler and Python's headers."""
    if device.type != "cpu":
        return True
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.is_file() and shutil.which(os.environ.get("CXX", "g++")) is not None


def local_device() -> torch.device:
    """The GPU of this rank if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def gather(value: T, group: ProcessGroup | None) -> list[T]:
    """The value of every rank, in the order of ranks; of this one alone without a group."""
    if group is None:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group=group)
    return values


@contextmanager
def raise_on_all_ranks(world: World) -> Iterator[None]:
    """Let every rank do something by itself; where one cannot, all leave together.

    Raises:
        SharedError: what the first of them said; a `SharedStorageError` if it was about a disk.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    except OSError as error:
        problem = os_error_message(error)
        if problem is None:
            raise
    own = problem and (isinstance(problem, StorageError), str(problem))
    told = [each for each in gather(own, world.writers) if each]
    if told:
        of_storage, message = told[0]
        raise (SharedStorageError if of_storage else SharedError)(message) from problem


@contextmanager
def reporting_lost_ranks(world: World) -> Iterator[None]:
    """Turn an error between ranks into one that says so.

    Raises:
        LostRankError: a rank is gone, or did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        told = str(error)
        between = isinstance(error, distributed.DistError) or any(
            word in told for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer")
        )
        if world.mesh is None or not between:
            raise
        cause = told.strip().splitlines()[0] if told.strip() else type(error).__name__
        raise LostRankError(
            f"rank {world.rank} of {world.size}: lost another rank ({cause}); begun again, the job "
            "goes on from its last checkpoint"
        ) from error


@contextmanager
def join_world(timeout: float = 600) -> Iterator[World]:
    """Join the job that torchrun or Slurm describes in the environment, or be a world of one.

    Args:
        timeout: seconds after which a rank that does not answer is taken for lost.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        yield World(device)
        return
    wait = timedelta(seconds=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=wait)
    try:
        rank, size = distributed.get_rank(), distributed.get_world_size()
        writers, signals = (distributed.new_group(backend="gloo", timeout=wait) for _ in range(2))
        yield World(device, rank, size, init_device_mesh(device.type, (size,)), writers, signals)
    finally:
        distributed.destroy_process_group()
