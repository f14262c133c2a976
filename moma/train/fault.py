"""A fault in training: what is told, and what is kept so that it can be replayed.

RUN/fault/fault.json           step, layer, loss, the checkpoint to begin from
RUN/fault/rank-0.safetensors   the micro-batches of that step, rank by rank
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moma.data.packing import Batch
from moma.errors import SharedError
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.manifest import write_json
from moma.runtime.world import World

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
        """Write a step's micro-batches, if they are still there."""
        found = {
            f"{index}.{part}": torch.from_numpy(getattr(batch, part)).contiguous()
            for index, batch in enumerate(self._batches.get(step, ()))
            for part in _PARTS
        }
        save_file(found, path)


def raise_fault(
    run: Run, world: World, recent: Recent, step: int, tensors: Mapping[str, Tensor], loss: Any
) -> None:
    """Save what a replay needs, and stop; all ranks together.

    Args:
        run: whose folder it is kept in.
        world: the ranks.
        recent: this rank's last micro-batches.
        step: the last one done.
        tensors: `first`, the number of the step at fault or 0, and `unsound`, by layer; see `Watch`
            and `Step`.
        loss: mean since the last row.

    Raises:
        UserError: always.
    """
    at = int(tensors["first"]) or step
    layers = tensors["unsound"].nonzero().flatten().tolist()
    folder = run.path / "fault"
    folder.mkdir(parents=True, exist_ok=True)
    recent.save(at, folder / f"rank-{world.rank}.safetensors")
    before = [path.name for path in checkpoints_in(run.checkpoints)]
    if world.rank == 0:
        finite = loss is not None and math.isfinite(loss)
        told = {"step": at, "layers": layers, "loss": loss if finite else str(loss)}
        told |= {"world_size": world.size, "micro_batches": recent.micro_batches}
        told["checkpoint"] = before[-1] if before else None
        write_json(folder / "fault.json", told)
    where = (
        f", a router of layer {layers[0]} gave a score that is NaN or infinite" if layers else ""
    )
    raise SharedError(
        f"{run.path}: at step {at} the loss or its gradient is not finite or explodes{where}; "
        f"`moma replay {run.path}` shows where, pretrain.on_fault=skip leaves such steps out, "
        "a lower learning rate avoids them"
    )
