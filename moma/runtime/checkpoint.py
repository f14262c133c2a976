"""Checkpoints: sharded safetensors through PyTorch's distributed checkpoint, never a pickle.

A checkpoint is a folder `step-00001000` that holds `tensors/` (model and optimizer, resharded on
load to any number of ranks), `rank-0.json` … (what belongs to one rank) and `state.json` (what
belongs to all). It is written under another name and renamed when every rank's files are there, so
that a folder of that name is always whole.
"""

import base64
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from moma.errors import UserError
from moma.runtime.weights import FILE_BYTES, Weights, write_weights
from moma.runtime.world import World

# A world of one saves and loads without a process group on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")

_OPTIONS = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    rank_state: dict[str, Any],
    world: World,
    keep: int,
) -> None:
    """Write a checkpoint and delete all but the newest `keep`.

    Args:
        folder: where the run's checkpoints live.
        state: JSON-able state that all ranks share.
        rank_state: JSON-able state of this rank; the state of its random numbers is added.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "tensors").mkdir(parents=True)
    world.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(partial / "tensors"), save_distributed=True)
    tensors = _model_tensors(model) | _optimizer_tensors(model, optimizer)
    dcp.save(tensors, storage_writer=writer, no_dist=world.mesh is None)
    _write_json(partial / f"rank-{world.rank}.json", rank_state | {"random": _random_state()})
    world.barrier()
    if world.rank == 0:
        _write_json(partial / "state.json", state | {"world_size": world.size})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints_in(folder)[:-keep]:
            # Renamed first: a folder without `.partial` is always whole.
            shutil.rmtree(old.rename(old.with_suffix(".partial")))
    world.barrier()


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: Optimizer, world: World
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Restore model, optimizer and random numbers; returns the shared state and this rank's.

    The rank's state is None if the checkpoint was written by another number of ranks.
    """
    state = read_state(path)
    if not any(path.glob("rank-*.json")):
        raise UserError(
            f"{path}: holds weights alone; train from them with from=RUN in another run"
        )
    load_model(path, model, world)
    # What the optimizer keeps besides tensors (learning rate, decay) is the recipe's.
    full = dcp_state.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    tensors = _only_tensors(full, "optimizer.")
    _read_tensors(path, tensors, world)
    full |= {key.removeprefix("optimizer."): value for key, value in tensors.items()}
    dcp_state.set_optimizer_state_dict(model, optimizer, full, options=_OPTIONS)
    if state["world_size"] != world.size:
        return state, None
    rank_state = _read_json(path / f"rank-{world.rank}.json")
    _restore_random_state(rank_state["random"])
    return state, rank_state


def load_model(path: Path, model: nn.Module, world: World) -> None:
    """Restore the weights of a model, sharded or whole.

    Raises:
        UserError: the checkpoint does not hold this model's weights.
    """
    tensors = _model_tensors(model)
    _read_tensors(path, tensors, world)
    weights = {key.removeprefix("model."): value for key, value in tensors.items()}
    dcp_state.set_model_state_dict(model, weights)


def save_weights(
    folder: Path, step: int, weights: Weights, state: dict[str, Any], file_bytes: int = FILE_BYTES
) -> None:
    """Write a checkpoint of a model's weights alone: to load and to train from, not to resume.

    Args:
        folder, step, state: as for `save_checkpoint`.
        weights: by their names in the model.
        file_bytes: as for `write_weights`.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    (partial / "tensors").mkdir(parents=True)
    stored = weights.renamed({name: f"model.{name}" for name in weights.outlines})
    write_weights(stored, partial / "tensors", file_bytes)
    _write_json(partial / "state.json", state | {"world_size": 1})
    partial.rename(final)


def stored_weights(path: Path) -> Weights:
    """The model's weights in a checkpoint, by their names in the model, to be read when needed.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        stored = dcp.HuggingFaceStorageReader(str(path / "tensors")).read_metadata()
    except Exception as error:  # safetensors' own derives from nothing else
        raise UserError(f"{path}: cannot read the checkpoint ({error})") from error
    outlines: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in stored.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty_like(outlines[name], device="cpu") for name in names}
        _read_tensors(path, tensors, World(torch.device("cpu")))
        return tensors

    names = {name: name.removeprefix("model.") for name in outlines}
    return Weights(outlines, read).renamed(names)


def read_state(path: Path) -> dict[str, Any]:
    """The state that all ranks share, with `world_size`."""
    return _read_json(path / "state.json")


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
        # The library's message ends with the cause, after the traceback of every rank.
        lines = [line for line in str(error).splitlines() if line.strip(" )")]
        cause = lines[-1].strip() if lines else type(error).__name__
        raise UserError(f"{path}: cannot load the checkpoint ({cause})") from error


def _model_tensors(model: nn.Module) -> dict[str, Any]:
    return _only_tensors(dcp_state.get_model_state_dict(model), "model.")


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    state = dcp_state.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return _only_tensors(state, "optimizer.")


def _only_tensors(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items() if isinstance(value, Tensor)}


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {key: base64.b64encode(bytes(value.tolist())).decode() for key, value in states.items()}


def _restore_random_state(states: dict[str, str]) -> None:
    tensors = {
        key: torch.tensor(list(base64.b64decode(value)), dtype=torch.uint8)
        for key, value in states.items()
    }
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read the checkpoint ({error})") from error
