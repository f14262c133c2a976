"""A fault in training: what is told, and what is kept so that it can be replayed.

RUN/fault/fault.json           step, layers, loss, gradient, the checkpoint to begin from
RUN/fault/rank-0.safetensors   the micro-batches of that step, rank by rank
RUN/fault/rank-0.json          the documents that are in them
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moma.data.batches.packing import Batch
from moma.errors import SharedError
from moma.model.transformer import first_nonfinite
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.manifest import write_json
from moma.runtime.world import World, raise_on_all_ranks
from moma.train.recipe import Recipe

_PARTS = ("tokens_BS", "labels_BS", "documents_BS", "positions_BS")


class Recent:
    """The micro-batches of this rank whose steps were not yet found sound."""

    def __init__(self) -> None:
        self._batches: dict[int, Sequence[Batch]] = {}

    def add(self, step: int, batches: Sequence[Batch]) -> None:
        """Remember a step's."""
        self._batches[step] = batches

    def forget(self, step: int) -> None:
        """Drop those until a step that was sound."""
        self._batches = {key: value for key, value in self._batches.items() if key > step}

    @property
    def micro_batches(self) -> int:
        """Of a step, on this rank."""
        return max(map(len, self._batches.values()), default=0)

    def save(self, step: int, path: Path) -> None:
        """Write a step's micro-batches, if they are still there, and beside them their origins."""
        batches = self._batches.get(step, ())
        found = {
            f"{index}.{part}": torch.from_numpy(getattr(batch, part)).contiguous()
            for index, batch in enumerate(batches)
            for part in _PARTS
        }
        save_file(found, path)
        write_json(path.with_suffix(".json"), {"documents": [batch.origins for batch in batches]})


def raise_fault(
    recipe: Recipe, world: World, recent: Recent, tensors: Mapping[str, Tensor]
) -> None:
    """Save what a replay needs, and stop; all ranks together.

    Args:
        recipe: of the run in whose folder it is kept.
        world: the ranks.
        recent: this rank's last micro-batches.
        tensors: the evidence of the watch; see `LossMonitor`.

    Raises:
        UserError: always.
    """
    run, step = Run(recipe.run), int(tensors["first"])
    layers = tensors["nonfinite"].nonzero().flatten().tolist()
    loss, norm = (float(tensors[key]) for key in ("fault_loss", "fault_norm"))
    folder = run.path / "fault"
    before = [path.name for path in checkpoints_in(run.checkpoints)]
    told = {
        "step": step,
        "layers": layers,
        "loss": loss if math.isfinite(loss) else str(loss),
        "gradient_norm": norm if math.isfinite(norm) else str(norm),
        "world_size": world.size,
        "micro_batches": recent.micro_batches,
        "checkpoint": before[-1] if before else None,
    }
    with raise_on_all_ranks(world):
        folder.mkdir(parents=True, exist_ok=True)
        recent.save(step, folder / f"rank-{world.rank}.safetensors")
        if world.rank == 0:
            write_json(folder / "fault.json", told)
    raise SharedError(
        f"{run.path}: at step {step} {_what(layers, loss, norm)}; `moma replay {run.path}` shows "
        f"where, {recipe.stage}.on_fault=skip leaves such steps out, a lower learning rate in a "
        "new run avoids them"
    )


def _what(layers: Sequence[int], loss: float, norm: float) -> str:
    """The first thing that is wrong, in the order in which a step computes."""
    if layers:
        return first_nonfinite(layers)
    if not math.isfinite(loss):
        return "the loss is not finite, though the outputs of all layers are"
    if not math.isfinite(norm):
        return "the gradient is not finite, though the loss is"
    return f"the loss of {loss:.4g} explodes"
