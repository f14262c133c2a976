"""Checkpoints: sharded safetensors through PyTorch's distributed checkpoint, never a pickle.

A checkpoint is a folder `step-00001000` with `tensors/` (model and optimizer, for any number of
ranks), `rank-0.json`, … (state of each rank), `state.json` (state shared by all ranks) and
`manifest.json` (size and checksum of these files). The file `latest` names the newest, for users.
"""

import base64
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from moma.errors import SharedError, UserError, error_reason
from moma.files import atomic_write, checksum, read_json
from moma.runtime.manifest import find_damage, read_manifest, write_manifest
from moma.runtime.weights import FILE_BYTES, Weights, require_match, write_weights
from moma.runtime.world import World, gather

# A single process saves and loads without a process group on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")

_OPTIONS = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)
_NAME = re.compile(r"step-(\d{8,})")
# Thresholds of earlier versions, which were averaged otherwise; they are not read.
_FORMER_BUFFER = ".cutoffs_3E"
# One that has taken a step, or several such of parts of the model.
Optimizers = Optimizer | tuple[Optimizer, ...]


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after a step."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The completed checkpoints in `folder`, oldest first; other files and folders are ignored."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def newest_intact(folder: Path, world: World) -> tuple[Path | None, dict[Path, str]]:
    """Find the newest checkpoint whose files match its manifest; all ranks together.

    Returns:
        The checkpoint, None if there are no checkpoints, and for each newer one a message that
        names its damaged files.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    candidates = gather([path.name for path in checkpoints_in(folder)], world.writers)[0]
    damaged: dict[Path, str] = {}
    for path in (folder / name for name in reversed(candidates)):
        parts = gather(find_damage(path, world.rank, world.size), world.writers)
        damage = dict.fromkeys(message for part in parts for message in part)
        if not damage:
            return path, damaged
        damaged[path] = "; ".join(damage)
    if damaged:
        raise SharedError(
            "every checkpoint is damaged: " + "; ".join(damaged.values()) + "; restore one from a "
            f"copy, or delete {folder} to start over"
        )
    return None, {}


def require_intact(path: Path) -> None:
    """Check a checkpoint's files; raises `UserError` if one is missing or damaged."""
    if damage := find_damage(path):
        raise UserError(f"{'; '.join(damage)}; restore it from a copy")


def update_latest(folder: Path) -> None:
    """Make the file `latest` name the newest checkpoint; without one, delete it."""
    found = checkpoints_in(folder)
    if found:
        atomic_write(folder / "latest", found[-1].name + "\n")
    else:
        (folder / "latest").unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that it is no longer considered."""
    suffixes = (".damaged" if number == 1 else f".damaged-{number}" for number in count(1))
    # The same step may have been damaged before.
    path.rename(next(new for new in map(path.with_suffix, suffixes) if not new.exists()))
    update_latest(path.parent)


def training_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """The tensors of model and optimizer by their names in checkpoints."""
    state = dcp_state.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return _model_tensors(model) | _only_tensors(state, "optimizer.")


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizers, world: World) -> None:
    """Restore model and optimizer, whatever number of ranks wrote the checkpoint.

    Raises:
        UserError: the checkpoint has only weights, or those of another model.
    """
    if is_weights_only(path):
        raise SharedError(f"{path}: has only weights; train from them with from=RUN in another run")
    load_model(path, model, world)
    # Hyperparameters such as the learning rate are those of the recipe, not of the checkpoint.
    full = dcp_state.get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    tensors = _only_tensors(full, "optimizer.")
    _load_tensors(path, tensors, world)
    full |= {key.removeprefix("optimizer."): value for key, value in tensors.items()}
    dcp_state.set_optimizer_state_dict(model, optimizer, full, options=_OPTIONS)


def load_model(path: Path, model: nn.Module, world: World) -> None:
    """Restore a model, sharded or not; see `matching_weights` for the errors.

    Buffers that the checkpoint lacks keep their values.
    """
    found = matching_weights(path, model).meta_tensors
    tensors = _model_tensors(model)
    stored = {key: tensor for key, tensor in tensors.items() if key.removeprefix("model.") in found}
    _load_tensors(path, stored, world)
    weights = {key.removeprefix("model."): value for key, value in tensors.items()}
    dcp_state.set_model_state_dict(model, weights)


def save_weights(
    folder: Path, step: int, weights: Weights, state: dict[str, Any], file_bytes: int = FILE_BYTES
) -> None:
    """Write a checkpoint of only a model's weights: to load and to train from, not to resume.

    Args:
        weights: by their names in the model.
        state: JSON-serializable, as `read_state` returns it.
        file_bytes: as for `write_weights`.
    """
    final = checkpoint_path(folder, step)
    partial = final.with_suffix(".partial")
    (partial / "tensors").mkdir(parents=True)
    stored = weights.renamed({name: f"model.{name}" for name in weights.meta_tensors})
    write_weights(stored, partial / "tensors", file_bytes)
    atomic_write(partial / "state.json", json.dumps(state | {"world_size": 1}))
    files = [path for path in partial.rglob("*") if path.is_file()]
    write_manifest(partial, {str(path.relative_to(partial)): checksum(path) for path in files})
    partial.rename(final)


def is_weights_only(path: Path) -> bool:
    """Whether a checkpoint was written by `save_weights`, so that it cannot be resumed."""
    return not any(name.startswith("rank-") for name in read_manifest(path))


def stored_weights(path: Path) -> Weights:
    """The model's weights in a checkpoint, by their names in the model, read on demand.

    Raises:
        UserError: the checkpoint is damaged.
    """
    reader = _tensor_reader(path)
    try:
        stored = reader.read_metadata()
    except Exception as error:  # safetensors' own error derives from Exception directly
        message = (
            f"{path}: cannot read the checkpoint ({error_reason(error)}); restore it from a copy"
        )
        raise UserError(message) from error
    meta_tensors: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in stored.state_dict_metadata.items()
        if name.startswith("model.")
        and not name.endswith(_FORMER_BUFFER)
        and isinstance(entry, TensorStorageMetadata)
    }

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty_like(meta_tensors[name], device="cpu") for name in names}
        _load_tensors(path, tensors, World(torch.device("cpu")))
        return tensors

    names = {name: name.removeprefix("model.") for name in meta_tensors}
    return Weights(meta_tensors, read).renamed(names)


def matching_weights(path: Path, model: nn.Module) -> Weights:
    """The weights in a checkpoint, checked to be those of a model; buffers may be missing.

    Args:
        model: sharded or not, on any device.

    Raises:
        UserError: the checkpoint is damaged, or has other weights.
    """
    stored = stored_weights(path)
    optional = {name for name, _ in model.named_buffers()} - stored.meta_tensors.keys()
    tensors = {key.removeprefix("model."): value for key, value in _model_tensors(model).items()}
    require_match(
        stored.meta_tensors,
        {name: tensor for name, tensor in tensors.items() if name not in optional},
        f"{path}: its weights are not those of the model in the run's recipe",
        "restore it from a copy, or use the recipe and the version of moma that wrote it",
    )
    return stored


def read_state(path: Path) -> dict[str, Any]:
    """The state shared by all ranks, with `world_size`."""
    return read_json(path / "state.json")


def read_rank_states(path: Path) -> list[dict[str, Any]]:
    """The states of all ranks that wrote the checkpoint, in rank order."""
    ranks = read_state(path)["world_size"]
    return [read_json(path / f"rank-{rank}.json") for rank in range(ranks)]


def random_state() -> dict[str, str]:
    """The state of this process's random number generators, JSON-serializable."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {key: base64.b64encode(bytes(value.tolist())).decode() for key, value in states.items()}


def restore_random_state(rank_state: Mapping[str, Any]) -> None:
    """Restore a saved rank's random number generators; draw no random number after this.

    Args:
        rank_state: one of `read_rank_states`.
    """
    tensors = {
        key: torch.tensor(list(base64.b64decode(value)), dtype=torch.uint8)
        for key, value in rank_state["random"].items()
    }
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def last_line(error: BaseException) -> str:
    """The last line of an error's message, which follows the tracebacks of all ranks."""
    lines = [line for line in str(error).splitlines() if line.strip(" )")]
    return lines[-1].strip() if lines else type(error).__name__


def _load_tensors(path: Path, tensors: dict[str, Any], world: World) -> None:
    """Read tensors of a checkpoint into existing ones of the same names and shapes, in place."""
    reader = _tensor_reader(path)
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=world.mesh is None)
    except (Exception, dcp.CheckpointException) as error:  # the latter is not an Exception
        raise UserError(
            f"{path}: cannot load the checkpoint ({last_line(error)}); restore it from a copy, or "
            "use the recipe that it was written with"
        ) from error


def _tensor_reader(path: Path) -> dcp.HuggingFaceStorageReader:
    """A reader of the files in the manifest; PyTorch's own reads every file in the folder."""
    files = [str(path / name) for name in read_manifest(path) if name.startswith("tensors/")]

    class ListedFiles(FileSystem):
        def ls(self, path: str | os.PathLike[str]) -> list[str]:
            return files

    reader = dcp.HuggingFaceStorageReader(str(path / "tensors"))
    reader.fs = ListedFiles()
    return reader


def _model_tensors(model: nn.Module) -> dict[str, Any]:
    return _only_tensors(dcp_state.get_model_state_dict(model), "model.")


def _only_tensors(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors in a state dict; boolean ones as bytes, since the library cannot read them."""
    return {
        prefix + key: value.view(torch.uint8) if value.dtype == torch.bool else value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
