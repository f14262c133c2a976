"""A fault in training (see `monitor.py`): what is saved for `moma replay`, and the message.

RUN/fault/fault.json           step, layers, loss, gradient norm, checkpoint to replay from
RUN/fault/rank-0.safetensors   the micro-batches of that step, per rank
RUN/fault/rank-0.json          the documents in them
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from moma.data.batches.packing import Batch
from moma.errors import SharedError, UserError, error_reason, shell_command
from moma.files import atomic_write, read_json
from moma.model.transformer import first_nonfinite
from moma.recipe import Config, check
from moma.runs import Run
from moma.runtime.checkpoint import checkpoints_in
from moma.runtime.weights import save_tensors
from moma.runtime.world import World, raise_on_all_ranks
from moma.train.recipe import Recipe

_BATCH_FIELDS = ("tokens_BS", "labels_BS", "document_ids_BS", "positions_BS")


class Fault(Config):
    """The content of `fault.json`.

    Attributes:
        step: the first step with a fault.
        layers: layers whose output or router logit is non-finite.
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


def raise_fault(
    recipe: Recipe,
    world: World,
    batches: Mapping[int, Sequence[Batch]],
    tensors: Mapping[str, Tensor],
) -> NoReturn:
    """Save what `moma replay` needs, and raise a `UserError`; all ranks together.

    Args:
        batches: this rank's micro-batches of recent steps, by step.
        tensors: `LossMonitor.first_fault`.
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
        micro_batches=len(batches[step]),
        checkpoint=checkpoints[-1].name if checkpoints else None,
    )
    folder = run.path / "fault"
    with raise_on_all_ranks(world):
        folder.mkdir(parents=True, exist_ok=True)
        saved = {
            f"{index}.{field}": torch.from_numpy(getattr(batch, field)).contiguous()
            for index, batch in enumerate(batches[step])
            for field in _BATCH_FIELDS
        }
        save_tensors(saved, folder / f"rank-{world.rank}.safetensors")
        documents = {"documents": [batch.origins for batch in batches[step]]}
        atomic_write(folder / f"rank-{world.rank}.json", json.dumps(documents))
        if world.rank == 0:
            atomic_write(folder / "fault.json", fault.model_dump_json())
    raise SharedError(
        f"{run.path}: at step {step} {_describe(layers, loss, norm)}; "
        f"`{shell_command('replay', run.path)}` shows where, {recipe.stage}.on_fault=skip skips "
        "such steps, a lower learning rate in a new run avoids them"
    )


def read_fault(run: Run) -> Fault:
    """The saved fault of a run; raises `UserError` if there is none, or it is damaged."""
    path = run.path / "fault" / "fault.json"
    if not path.is_file():
        raise UserError(f"{run.path}: has no saved fault (no fault/fault.json) to replay")
    return check(Fault, read_json(path), str(path))


def read_fault_batches(
    run: Run, rank: int
) -> tuple[dict[str, Tensor], list[list[list[tuple[str, int]]]]]:
    """Read the micro-batches that a rank saved.

    Returns:
        Tensors `INDEX.tokens_BS`, …, and for each micro-batch the `origins` of `Batch`.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = run.path / "fault" / f"rank-{rank}.safetensors"
    documents = path.with_suffix(".json")
    try:
        return load_file(path), read_json(documents)["documents"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{documents}: damaged; has no 'documents'") from error
    except UserError:
        raise
    except Exception as error:  # safetensors' own error derives from Exception directly
        raise UserError(f"{path}: cannot read the micro-batches ({error_reason(error)})") from error


def _describe(layers: Sequence[int], loss: float, norm: float) -> str:
    """The first non-finite value in the order of computation, or the explosion of the loss."""
    if layers:
        return first_nonfinite(layers)
    if not math.isfinite(loss):
        return "the loss is not finite, though the outputs of all layers are"
    if not math.isfinite(norm):
        return "the gradient is not finite, though the loss is"
    return f"the loss of {loss:.4g} explodes"
