"""A fault in training (see `monitor.py`): what is saved for `moma replay`, and the message.

RUN/fault/fault.json           step, layers, loss, gradient norm, checkpoint to replay from
RUN/fault/rank-0.safetensors   the micro-batches of that step, per rank
RUN/fault/rank-0.json          the documents in them
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from moma.data.batches.packing import Batch
from moma.errors import SharedError, UserError, shell_command
from moma.files import atomic_write, read_json
from moma.model.transformer import first_nonfinite
from moma.recipe import Config, check
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.world import World, raise_on_all_ranks
from moma.train.recipe import Recipe

_BATCH_FIELDS = ("tokens_BS", "labels_BS", "documents_BS", "positions_BS")


class Fault(Config):
    """The content of `fault.json`.

    Attributes:
        step: the first step with a fault.
        layers: layers whose output or router score is non-finite.
        loss: mean loss of the step; a string if it is non-finite.
        gradient_norm: norm of the gradient; a string if it is non-finite.
        world_size: number of ranks.
        micro_batches: micro-batches of the step on each rank.
        checkpoint: name of the newest checkpoint before the step, if there is one.
    """

    step: int = Field(ge=1)
    layers: tuple[int, ...]
    loss: float | str
    gradient_norm: float | str
    world_size: int = Field(ge=1)
    micro_batches: int
    checkpoint: str | None = Field(None, pattern=r"^step-\d{8,}$")


class RecentBatches:
    """This rank's micro-batches of the steps that have not been checked yet."""

    def __init__(self) -> None:
        self._batches: dict[int, Sequence[Batch]] = {}

    def add(self, step: int, batches: Sequence[Batch]) -> None:
        """Keep a step's micro-batches."""
        self._batches[step] = batches

    def drop_until(self, step: int) -> None:
        """Drop the micro-batches of all steps up to one that has no fault."""
        self._batches = {key: value for key, value in self._batches.items() if key > step}

    @property
    def per_step(self) -> int:
        """Micro-batches per step on this rank."""
        return max(map(len, self._batches.values()), default=0)

    def save(self, step: int, path: Path) -> None:
        """Write a step's micro-batches, and beside them which documents they contain."""
        batches = self._batches.get(step, ())
        tensors = {
            f"{index}.{field}": torch.from_numpy(getattr(batch, field)).contiguous()
            for index, batch in enumerate(batches)
            for field in _BATCH_FIELDS
        }
        save_file(tensors, path)
        documents = {"documents": [batch.origins for batch in batches]}
        atomic_write(path.with_suffix(".json"), json.dumps(documents))


def read_fault(run: Run) -> Fault:
    """The saved fault of a run.

    Raises:
        UserError: the run has none, or the file is damaged.
    """
    path = run.path / "fault" / "fault.json"
    if not path.is_file():
        raise UserError(f"{run.path}: has no saved fault (no fault/fault.json) to replay")
    return check(Fault, read_json(path), str(path))


def read_fault_batches(
    run: Run, rank: int
) -> tuple[dict[str, Tensor], list[list[list[tuple[str, int]]]]]:
    """A rank's saved micro-batches: tensors `INDEX.tokens_BS`, …, and documents per sequence.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = run.path / "fault" / f"rank-{rank}.safetensors"
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors' own error derives from Exception directly
        raise UserError(f"{path}: cannot read the micro-batches ({error})") from error
    documents = path.with_suffix(".json")
    try:
        return tensors, read_json(documents)["documents"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{documents}: damaged; has no 'documents'") from error


def raise_fault(
    recipe: Recipe, world: World, recent: RecentBatches, tensors: Mapping[str, Tensor]
) -> None:
    """Save what `moma replay` needs, and raise the error; all ranks together.

    Args:
        recipe: the run's recipe.
        world: the ranks.
        recent: this rank's micro-batches.
        tensors: `LossMonitor.first_fault` on the host.

    Raises:
        UserError: always.
    """
    run, step = Run(recipe.run), int(tensors["fault_step"])
    layers = tensors["fault_nonfinite"].nonzero().flatten().tolist()
    loss, norm = float(tensors["fault_loss"]), float(tensors["fault_norm"])
    checkpoints = checkpoints_in(run.checkpoints)
    fault = Fault(
        step=step,
        layers=layers,
        loss=loss if math.isfinite(loss) else str(loss),
        gradient_norm=norm if math.isfinite(norm) else str(norm),
        world_size=world.size,
        micro_batches=recent.per_step,
        checkpoint=checkpoints[-1].name if checkpoints else None,
    )
    folder = run.path / "fault"
    with raise_on_all_ranks(world):
        folder.mkdir(parents=True, exist_ok=True)
        recent.save(step, folder / f"rank-{world.rank}.safetensors")
        if world.rank == 0:
            atomic_write(folder / "fault.json", fault.model_dump_json())
    command = shell_command("replay", run.path)
    raise SharedError(
        f"{run.path}: at step {step} {_describe(layers, loss, norm)}; `{command}` "
        f"shows where, {recipe.stage}.on_fault=skip skips such steps, a lower learning rate in a "
        "new run avoids them"
    )


def _describe(layers: Sequence[int], loss: float, norm: float) -> str:
    """The first non-finite value in the order of computation, or the explosion of the loss."""
    if layers:
        return first_nonfinite(layers)
    if not math.isfinite(loss):
        return "the loss is not finite, though the outputs of all layers are"
    if not math.isfinite(norm):
        return "the gradient is not finite, though the loss is"
    return f"the loss of {loss:.4g} explodes"
