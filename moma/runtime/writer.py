"""Checkpoint writing in the background: copy, write, verify, and only then publish."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate

from moma.errors import SharedStorageError, StorageError
from moma.files import Checksum, atomic_write, checksum, sync_folder
from moma.runtime.checkpoint import (
    checkpoint_path,
    checkpoints_in,
    last_line,
    random_state,
    step_of,
    update_latest,
)
from moma.runtime.manifest import write_manifest
from moma.runtime.world import World, gather, raise_on_all_ranks

# Reserve for file headers and JSON files beside the tensors.
_SMALL_FILES_BYTES = 1 << 20
# Seconds to wait for the files of other nodes: a network file system may show a folder's state of
# up to a minute ago.
_VISIBILITY_TIMEOUT = 60
_PARTIAL = re.compile(r"step-\d{8,}\.partial")


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time. Close it after use.

    All ranks call every method together, except `remove_partial`. Errors are `StorageError`s.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        keep: int = 2,
        keep_every: int = 0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Create the writer.

        Args:
            keep: number of newest checkpoints to keep.
            keep_every: checkpoints at multiples of this step are kept too; 0: none.
        """
        self._folder, self._world = folder, world
        self._keep, self._keep_every, self._sleep = keep, keep_every, sleep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def remove_partial(self) -> None:
        """Remove unfinished checkpoints of earlier processes; rank 0 only, before any `save`."""
        for path in self._folder.glob("step-*.partial"):
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any],
        best: int | None = None,
    ) -> None:
        """Copy everything and start to write it, once the previous checkpoint is complete.

        Args:
            tensors: by name, sharded or the same on every rank.
            state: JSON-serializable state shared by all ranks.
            rank_state: JSON-serializable state of this rank, besides random number generators.
            best: step of a checkpoint, this one or an earlier one, that is kept as the best.

        Raises:
            StorageError: the disk is too full, or the previous checkpoint could not be written.
        """
        self.wait()
        final = checkpoint_path(self._folder, step)
        tensor_folder = final.with_suffix(".partial") / "tensors"
        own_bytes = sum(map(_written_bytes, tensors.values()))
        needed = sum(gather(own_bytes, self._world.writers)) + _SMALL_FILES_BYTES
        with self._write_errors(final):
            if self._world.rank == 0:
                _make_folder(tensor_folder, needed)
        saving = dcp.async_save(
            tensors,
            storage_writer=dcp.HuggingFaceStorageWriter(str(tensor_folder), save_distributed=True),
            # Ranks whose shards have not changed do not exchange plans again.
            planner=dcp.DefaultSavePlanner(enable_plan_caching=True),
            process_group=self._world.writers,
            no_dist=self._world.mesh is None,
        )
        upload = saving if isinstance(saving, Future) else saving.upload_completion
        own = dict(rank_state) | {"random": random_state()}
        shared = dict(state) | {"world_size": self._world.size}
        self._pending = self._thread.submit(self._finish, upload, final, shared, own, best)

    def wait(self) -> None:
        """Wait until the last checkpoint is complete; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the background thread to end."""
        self._thread.shutdown()

    @contextmanager
    def _write_errors(self, final: Path) -> Iterator[None]:
        """Raise a `StorageError` on all ranks if the block fails on any rank."""
        with raise_on_all_ranks(self._world):
            try:
                yield
            except (Exception, dcp.CheckpointException) as error:  # the latter is not an Exception
                kept = checkpoints_in(self._folder)
                before = f"{kept[-1].name} is kept" if kept else "there is none before it"
                raise StorageError(
                    f"{final}: cannot write the checkpoint ({last_line(error)}); {before}; check "
                    "the disk"
                ) from error

    def _finish(
        self,
        upload: Future[Any],
        final: Path,
        state: dict[str, Any],
        own: dict[str, Any],
        best: int | None,
    ) -> None:
        """Wait for the tensors, write the rest and publish."""
        partial, rank = final.with_suffix(".partial"), self._world.rank
        try:
            with self._write_errors(final):
                upload.result()
                atomic_write(partial / f"rank-{rank}.json", json.dumps(own))
                # The library numbers the files of ranks from 1.
                shards = sorted((partial / "tensors").glob(f"shard-{rank + 1:05d}-*"))
                files = [*shards, partial / f"rank-{rank}.json"]
                entries = {str(file.relative_to(partial)): checksum(file) for file in files}
            parts = gather(entries, self._world.writers)
            with self._write_errors(final):
                if rank == 0:
                    entries = {name: entry for part in parts for name, entry in part.items()}
                    self._publish(final, entries, state)
                    self._remove_old(best)
        except SharedStorageError:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _publish(self, final: Path, entries: dict[str, Checksum], state: dict[str, Any]) -> None:
        partial = final.with_suffix(".partial")
        atomic_write(partial / "state.json", json.dumps(state))
        entries = {**entries, "state.json": checksum(partial / "state.json")}
        for _ in range(_VISIBILITY_TIMEOUT):
            if _files_in(partial) == entries.keys():
                break
            self._sleep(1)
        if wrong := _files_in(partial) ^ entries.keys():
            raise OSError(f"{sorted(wrong)[0]} is missing, or of no rank of this job")
        write_manifest(partial, entries)
        sync_folder(partial / "tensors")
        sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(self._folder)
        update_latest(self._folder)

    def _remove_old(self, best: int | None) -> None:
        if best is not None:
            atomic_write(self._folder / "best", checkpoint_path(self._folder, best).name + "\n")
        for old in checkpoints_in(self._folder)[: -self._keep]:
            step = step_of(old)
            if step != best and not (self._keep_every and step % self._keep_every == 0):
                # Renamed first: a folder without a suffix is always complete. One that cannot be
                # removed, as on a network disk while it is read, is removed by a later process.
                shutil.rmtree(old.rename(old.with_suffix(".partial")), ignore_errors=True)


def _make_folder(tensor_folder: Path, needed: int) -> None:
    """Create the folder of an unfinished checkpoint if the disk has room for `needed` bytes."""
    partial = tensor_folder.parent
    shutil.rmtree(partial, ignore_errors=True)
    tensor_folder.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed:
        shutil.rmtree(partial)
        raise OSError(f"needs {needed:,} bytes, but the disk has {free:,}")


def _files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def _written_bytes(tensor: Tensor) -> int:
    """Bytes that this rank adds to a checkpoint; of replicated shards only one is written."""
    if not isinstance(tensor, DTensor):
        return tensor.nbytes
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    copies = prod(size for size, placement in sizes if isinstance(placement, Replicate))
    return -(-tensor.to_local().nbytes // copies)
