"""The file of thresholds that `moma calibrate` computes for a checkpoint of a run."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moma.errors import UserError
from moma.files import atomic_open
from moma.model.transformer import Transformer
from moma.runs import Run
from moma.runtime.manifest import MANIFEST


def thresholds_file(run: Run) -> Path:
    """The file in a run's folder."""
    return run.path / "thresholds.safetensors"


@torch.no_grad()
def write_thresholds(run: Run, checkpoint: Path, model: Transformer) -> None:
    """Write the thresholds of a model that was loaded from a checkpoint."""
    cutoffs = {name: cutoff_means_3E.cpu() for name, cutoff_means_3E in _cutoffs(model).items()}
    with atomic_open(thresholds_file(run)) as file:
        file.write(save(cutoffs, {"checkpoint": _fingerprint(checkpoint)}))


@torch.no_grad()
def load_thresholds(run: Run, checkpoint: Path, model: Transformer) -> None:
    """Load a run's file of thresholds, if it is of the checkpoint; see `read_thresholds`."""
    for name, cutoff_means_3E in read_thresholds(run, checkpoint, model).items():
        model.get_buffer(name).copy_(cutoff_means_3E)


def read_thresholds(run: Run, checkpoint: Path, model: Transformer) -> dict[str, torch.Tensor]:
    """A run's thresholds for a checkpoint, by the model's names; none without such a file.

    Args:
        model: of the checkpoint, on any device.

    Raises:
        UserError: the file is damaged.
    """
    path = thresholds_file(run)
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            if file.metadata()["checkpoint"] != _fingerprint(checkpoint):
                return {}
            cutoffs = _cutoffs(model)
            if cutoffs.keys() != set(file.keys()):  # of another version
                return {}
            return {
                name: torch.empty(cutoff_means_3E.shape).copy_(file.get_tensor(name))
                for name, cutoff_means_3E in cutoffs.items()
            }
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); delete it, and compute it again with "
            "`moma calibrate`"
        ) from error


def _cutoffs(model: Transformer) -> dict[str, torch.Tensor]:
    return {
        name: value for name, value in model.named_buffers() if name.endswith(".cutoff_means_3E")
    }


def _fingerprint(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()[:16]
