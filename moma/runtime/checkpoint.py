"""Checkpoints: sharded safetensors through PyTorch's distributed checkpoint, never a pickle.

A checkpoint is a folder `step-00001000`:

    tensors/               model and optimizer, resharded on load to any number of ranks
    rank-0.json …          what belongs to one rank
    state.json             what belongs to all
    manifest.json          size and checksum of each of these

`writer.py` writes them. The folder has another name until every rank's files are on the disk; only
then `latest`, a file beside it, names it.
"""

import base64
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from moma.errors import SharedError, UserError
from moma.files import atomic_write
from moma.runtime.manifest import checksum, find_faults, read_json, write_json, write_manifest
from moma.runtime.weights import FILE_BYTES, Weights, write_weights
from moma.runtime.world import World, gather

# A world of one saves and loads without a process group on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")

_OPTIONS = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """The completed checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(path.name.removeprefix("step-"))


def newest_whole(folder: Path, world: World) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose files are all as they were written; all ranks together.

    Returns:
        The checkpoint, None if there is none at all, and what is wrong with newer ones, each
        message that names the checkpoint and file.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    candidates = gather([path.name for path in checkpoints_in(folder)], world.writers)[0]
    damaged: dict[Path, str] = {}
    for path in (folder / name for name in reversed(candidates)):
        parts = gather(find_faults(path, world.rank, world.size), world.writers)
        faults = [fault for part in parts for fault in part]
        if not faults:
            return path, damaged
        damaged[path] = f"{path}: {', '.join(dict.fromkeys(faults))}"
    if damaged:
        raise SharedError(
            "no checkpoint is whole: " + "; ".join(damaged.values()) + "; restore one from a copy, "
            f"or delete {folder} to begin anew"
        )
    return None, {}


def name_latest(folder: Path) -> None:
    """Let the file `latest` name the newest checkpoint; without one it is gone."""
    found = checkpoints_in(folder)
    if found:
        atomic_write(folder / "latest", found[-1].name + "\n")
    else:
        (folder / "latest").unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is no longer taken for one, nor named by `latest`."""
    number, aside = 1, path.with_suffix(".damaged")
    while aside.exists():  # the same step was damaged before
        number += 1
        aside = path.with_suffix(f".damaged-{number}")
    path.rename(aside)
    name_latest(path.parent)


def holds_weights_alone(path: Path) -> bool:
    """Whether a checkpoint is one of `save_weights`: nothing to go on from but the weights."""
    return not any(path.glob("rank-*.json"))


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Restore model and optimizer, whatever number of ranks they were written by.

    Raises:
        UserError: the checkpoint holds weights alone, or those of another model.
    """
    if holds_weights_alone(path):
        raise SharedError(
            f"{path}: holds weights alone; train from them with from=RUN in another run"
        )
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
    tensors = model_tensors(model)
    _read_tensors(path, tensors, world)
    weights = {key.removeprefix("model."): value for key, value in tensors.items()}
    dcp_state.set_model_state_dict(model, weights)


def save_weights(
    folder: Path, step: int, weights: Weights, state: dict[str, Any], file_bytes: int = FILE_BYTES
) -> None:
    """Write a checkpoint of a model's weights alone: to load and to train from, not to resume.

    Args:
        folder: where the run's checkpoints live.
        step: names the checkpoint.
        weights: by their names in the model.
        state: JSON-able state.
        file_bytes: as for `write_weights`.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    (partial / "tensors").mkdir(parents=True)
    stored = weights.renamed({name: f"model.{name}" for name in weights.outlines})
    write_weights(stored, partial / "tensors", file_bytes)
    write_json(partial / "state.json", state | {"world_size": 1})
    files = [path for path in partial.rglob("*") if path.is_file()]
    write_manifest(partial, {str(path.relative_to(partial)): checksum(path) for path in files})
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
        raise UserError(f"{path}: cannot load the checkpoint ({cause(error)})") from error


def cause(error: BaseException) -> str:
    """The last line of the library's message, which follows the tracebacks of all ranks."""
    lines = [line for line in str(error).splitlines() if line.strip(" )")]
    return lines[-1].strip() if lines else type(error).__name__


def model_tensors(model: nn.Module) -> dict[str, Any]:
    """A model's tensors by the names that they have in checkpoints."""
    return _only_tensors(dcp_state.get_model_state_dict(model), "model.")


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's tensors by the names that they have in checkpoints."""
    state = dcp_state.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return _only_tensors(state, "optimizer.")


def _only_tensors(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items() if isinstance(value, Tensor)}
