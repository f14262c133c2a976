"""Checkpoints: sharded safetensors through PyTorch's distributed checkpoint, never a pickle.

A checkpoint is a folder `step-00001000`:

    tensors/               model and optimizer, resharded on load to any number of ranks
    rank-0.json …          what belongs to one rank
    state.json             what belongs to all
    manifest.json          size and checksum of each of these

The tensors are copied, then written while the training goes on. The folder has another name until
every rank's files are on the disk; only then `latest` is led to it.
"""

import base64
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moma.errors import UserError
from moma.runtime.manifest import (
    Entry,
    checksum,
    find_faults,
    read_json,
    sync_folders,
    write_json,
    write_manifest,
)
from moma.runtime.world import World, gather

# A world of one saves and loads without a process group on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")

_OPTIONS = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)
# Room for file headers and JSON beside the tensors.
_SMALL_FILES = 1 << 20


def checkpoints_in(folder: Path) -> list[Path]:
    """The completed checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; to be closed.

    All ranks call every method together.
    """

    def __init__(self, folder: Path, world: World, keep: int = 2, keep_every: int = 0):
        """Set up.

        Args:
            folder: where the run's checkpoints live.
            world: the ranks.
            keep: how many of the newest stay.
            keep_every: checkpoints at multiples of so many steps stay too; 0: none.
        """
        self._folder, self._world = folder, world
        self._keep, self._keep_every = keep, keep_every
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._underway: Future[str | None] | None = None

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
            UserError: the disk has no room, or the checkpoint before could not be written.
        """
        self.wait()
        final = self._folder / f"step-{step:08d}"
        partial = final.with_suffix(".partial")
        tensors = _model_tensors(model) | _optimizer_tensors(model, optimizer)
        self._agree(final, self._make_room(partial, sum(map(_local_bytes, tensors.values()))))
        writer = dcp.HuggingFaceStorageWriter(str(partial / "tensors"), save_distributed=True)
        written = dcp.async_save(
            tensors,
            storage_writer=writer,
            process_group=self._world.writers,
            no_dist=self._world.mesh is None,
        )
        own = dict(rank_state) | {"random": _random_state()}
        shared = dict(state) | {"world_size": self._world.size}
        self._underway = self._thread.submit(self._finish, written, final, shared, own)

    def wait(self) -> None:
        """Wait until what was saved last is whole.

        Raises:
            UserError: it could not be written.
        """
        if self._underway is not None:
            underway, self._underway = self._underway, None
            if problem := underway.result():
                raise UserError(problem)

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
            raise UserError(told)

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
            problem = _cause(error)
        refusal = self._refusal(final, problem)
        parts = gather(entries, self._world.writers)
        if rank == 0 and refusal is None:
            try:
                self._publish(final, {k: v for part in parts for k, v in part.items()}, state)
            except Exception as error:
                problem = _cause(error)
        if rank == 0 and (refusal or problem):
            shutil.rmtree(partial, ignore_errors=True)
        return refusal or self._refusal(final, problem)

    def _publish(self, final: Path, entries: dict[str, Entry], state: dict[str, Any]) -> None:
        partial = final.with_suffix(".partial")
        write_json(partial / "state.json", state)
        entries = {**entries, "state.json": checksum(partial / "state.json")}
        found = {str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file()}
        if found != entries.keys():
            raise OSError(f"{sorted(found ^ entries.keys())[0]} is there without its rank, or gone")
        write_manifest(partial, entries)
        sync_folders([partial / "tensors", partial])
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folders([self._folder])
        link = self._folder / "latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(final.name)
        link.replace(self._folder / "latest")
        sync_folders([self._folder])
        for old in self._superfluous():
            # Renamed first: a folder without a suffix is always complete.
            shutil.rmtree(old.rename(old.with_suffix(".partial")))

    def _superfluous(self) -> list[Path]:
        older = checkpoints_in(self._folder)[: -self._keep]
        every = self._keep_every
        return [path for path in older if not (every and step_of(path) % every == 0)]


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(path.name.removeprefix("step-"))


def newest_whole(folder: Path, world: World) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all as they were written.

    Returns:
        The checkpoint, None if there is none at all, and what is wrong with newer ones, each
        message naming checkpoint and file.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    candidates = gather([path.name for path in checkpoints_in(folder)], world.writers)[0]
    damaged: list[str] = []
    for path in (folder / name for name in reversed(candidates)):
        parts = gather(find_faults(path, world.rank, world.size), world.writers)
        faults = [fault for part in parts for fault in part]
        if not faults:
            return path, damaged
        damaged.append(f"{path}: {', '.join(dict.fromkeys(faults))}")
    if damaged:
        raise UserError(
            "no checkpoint is whole: " + "; ".join(damaged) + "; restore one from a copy, "
            f"or delete {folder} to begin anew"
        )
    return None, []


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Restore model and optimizer, whatever number of ranks they were written by."""
    load_model(path, model, world)
    # What the optimizer keeps besides tensors (learning rate, decay) is the recipe's.
    full = dcp_state.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    tensors = _only_tensors(full, "optimizer.")
    _read_tensors(path, tensors, world)
    full |= {key.removeprefix("optimizer."): value for key, value in tensors.items()}
    dcp_state.set_optimizer_state_dict(model, optimizer, full, options=_OPTIONS)


def load_model(path: Path, model: nn.Module, world: World) -> None:
    """Restore the weights of a model, sharded or whole.

    Raises:
        UserError: the checkpoint does not hold this model's weights.
    """
    tensors = _model_tensors(model)
    _read_tensors(path, tensors, world)
    weights = {key.removeprefix("model."): value for key, value in tensors.items()}
    dcp_state.set_model_state_dict(model, weights)


def read_state(path: Path) -> dict[str, Any]:
    """The state that all ranks share, with `world_size`."""
    return read_json(path / "state.json")


def read_rank_states(path: Path) -> list[dict[str, Any]]:
    """The states of all ranks that wrote the checkpoint, in their order."""
    ranks = read_state(path)["world_size"]
    return [read_json(path / f"rank-{rank}.json") for rank in range(ranks)]


def restore_random_state(rank_state: Mapping[str, Any]) -> None:
    """Go on with the random numbers of a saved rank; from here on, whoever draws changes them."""
    tensors = {
        key: torch.tensor(list(base64.b64decode(value)), dtype=torch.uint8)
        for key, value in rank_state["random"].items()
    }
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _read_tensors(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    reader = dcp.HuggingFaceStorageReader(str(path / "tensors"))
    try:
        dcp.load(
            tensors,
            storage_reader=reader,
            planner=DefaultLoadPlanner(),
            no_dist=world.mesh is None,
        )
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        raise UserError(f"{path}: cannot load the checkpoint ({_cause(error)})") from error


def _cause(error: BaseException) -> str:
    """The last line of the library's message, which follows the tracebacks of all ranks."""
    lines = [line for line in str(error).splitlines() if line.strip(" )")]
    return lines[-1].strip() if lines else type(error).__name__


def _model_tensors(model: nn.Module) -> dict[str, Any]:
    return _only_tensors(dcp_state.get_model_state_dict(model), "model.")


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    state = dcp_state.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return _only_tensors(state, "optimizer.")


def _only_tensors(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items() if isinstance(value, Tensor)}


def _local_bytes(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {key: base64.b64encode(bytes(value.tolist())).decode() for key, value in states.items()}
