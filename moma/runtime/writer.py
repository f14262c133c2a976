"""Writing checkpoints beside the training: copied, written, checked, and only then published."""

import base64
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from moma.errors import SharedStorageError
from moma.files import sync_folder
from moma.runtime.checkpoint import (
    cause,
    checkpoints_in,
    model_tensors,
    name_latest,
    optimizer_tensors,
    step_of,
)
from moma.runtime.manifest import Entry, checksum, write_json, write_manifest
from moma.runtime.world import World, gather

# Room for file headers and JSON beside the tensors.
_SMALL_FILES = 1 << 20
# Seconds within which other nodes' files should be seen: a network's disk shows a folder as it was
# up to a minute ago.
_LATE = 60


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; to be closed.

    All ranks call every method together, `sweep` excepted.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        keep: int = 2,
        keep_every: int = 0,
        pause: Callable[[float], None] = time.sleep,
    ):
        """Set up.

        Args:
            folder: where the run's checkpoints live.
            world: the ranks.
            keep: how many of the newest stay.
            keep_every: checkpoints at multiples of so many steps stay too; 0: none.
            pause: waits for so many seconds.
        """
        self._folder, self._world = folder, world
        self._keep, self._keep_every, self._pause = keep, keep_every, pause
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._underway: Future[str | None] | None = None

    def sweep(self) -> None:
        """Remove what earlier processes left unfinished: perhaps no step comes by its name again.

        Rank 0 alone, before anything is saved.
        """
        for path in self._folder.glob("step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any],
    ) -> None:
        """Copy everything and begin to write it.

        Args:
            step: names the checkpoint.
            model: its weights are saved, trained or not.
            optimizer: its tensors are saved; its settings are the recipe's.
            state: JSON-able state that all ranks share.
            rank_state: JSON-able state of this rank; the state of its random numbers is added.

        Raises:
            StorageError: the disk has no room, or the checkpoint before could not be written.
        """
        self.wait()
        final = self._folder / f"step-{step:08d}"
        partial = final.with_suffix(".partial")
        tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
        self._agree(final, self._make_room(partial, sum(map(_written_bytes, tensors.values()))))
        writer = dcp.HuggingFaceStorageWriter(str(partial / "tensors"), save_distributed=True)
        written = dcp.async_save(
            tensors,
            storage_writer=writer,
            process_group=self._world.writers,
            no_dist=self._world.mesh is None,
        )
        upload = written if isinstance(written, Future) else written.upload_completion
        own = dict(rank_state) | {"random": _random_state()}
        shared = dict(state) | {"world_size": self._world.size}
        self._underway = self._thread.submit(self._finish, upload, final, shared, own)

    def wait(self) -> None:
        """Wait until what was saved last is whole.

        Raises:
            StorageError: it could not be written.
        """
        if self._underway is not None:
            underway, self._underway = self._underway, None
            if problem := underway.result():
                raise SharedStorageError(problem)

    def close(self) -> None:
        """Let the thread end; what it writes is written to the end."""
        self._thread.shutdown()

    def _make_room(self, partial: Path, own_bytes: int) -> str | None:
        """Make the folder; tells what is wrong with the disk."""
        needed = sum(gather(own_bytes, self._world.writers)) + _SMALL_FILES
        if self._world.rank > 0:
            return None
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "tensors").mkdir(parents=True)
            free = shutil.disk_usage(partial).free
            if free < needed:
                shutil.rmtree(partial)
                return f"needs {needed:,} bytes, but the disk has {free:,}"
        except OSError as error:
            return error.strerror or str(error)
        return None

    def _agree(self, final: Path, problem: str | None) -> None:
        if told := self._refusal(final, problem):
            raise SharedStorageError(told)

    def _refusal(self, final: Path, problem: str | None) -> str | None:
        """The message for every rank if one has a problem."""
        told = [each for each in gather(problem, self._world.writers) if each]
        if not told:
            return None
        kept = checkpoints_in(self._folder)
        before = f"{kept[-1].name} is kept" if kept else "there is none before it"
        return f"{final}: cannot write the checkpoint ({told[0]}); {before}, free some disk space"

    def _finish(
        self, written: Future[Any], final: Path, state: dict[str, Any], own: dict[str, Any]
    ) -> str | None:
        """Wait for the tensors, write the rest, publish; in the background. Tells what failed."""
        partial, rank = final.with_suffix(".partial"), self._world.rank
        problem, entries = None, {}
        try:
            written.result()
            write_json(partial / f"rank-{rank}.json", own)
            # The writer names files by rank, from 1.
            shards = sorted((partial / "tensors").glob(f"shard-{rank + 1:05d}-*"))
            files = [*shards, partial / f"rank-{rank}.json"]
            entries = {str(file.relative_to(partial)): checksum(file) for file in files}
        except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
            problem = cause(error)
        refusal = self._refusal(final, problem)
        parts = gather(entries, self._world.writers)
        if rank == 0 and refusal is None:
            try:
                self._publish(final, {k: v for part in parts for k, v in part.items()}, state)
            except Exception as error:
                problem = cause(error)
        if rank == 0 and (refusal or problem):
            shutil.rmtree(partial, ignore_errors=True)
        return refusal or self._refusal(final, problem)

    def _publish(self, final: Path, entries: dict[str, Entry], state: dict[str, Any]) -> None:
        partial = final.with_suffix(".partial")
        write_json(partial / "state.json", state)
        entries = {**entries, "state.json": checksum(partial / "state.json")}
        for _ in range(_LATE):
            if _files_in(partial) >= entries.keys():
                break
            self._pause(1)
        if wrong := _files_in(partial) ^ entries.keys():
            raise OSError(f"{sorted(wrong)[0]} is there without its rank, or gone")
        write_manifest(partial, entries)
        sync_folder(partial / "tensors")
        sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(self._folder)
        name_latest(self._folder)
        for old in self._superfluous():
            # Renamed first: a folder without a suffix is always complete. What cannot be removed,
            # as on a network's disk while it is read, is swept up later.
            shutil.rmtree(old.rename(old.with_suffix(".partial")), ignore_errors=True)

    def _superfluous(self) -> list[Path]:
        older = checkpoints_in(self._folder)[: -self._keep]
        every = self._keep_every
        return [path for path in older if not (every and step_of(path) % every == 0)]


def _files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def _written_bytes(tensor: Tensor) -> int:
    """What a rank adds to a checkpoint: of equal shards, one is written."""
    if not isinstance(tensor, DTensor):
        return tensor.nbytes
    copies = prod(
        tensor.device_mesh.size(number)
        for number, placement in enumerate(tensor.placements)
        if isinstance(placement, Replicate)
    )
    return -(-tensor.to_local().nbytes // copies)


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {key: base64.b64encode(bytes(value.tolist())).decode() for key, value in states.items()}
