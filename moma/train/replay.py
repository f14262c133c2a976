"""A fault, seen again: the same steps from the checkpoint before it, then the step itself, open.

One process plays all ranks. Random numbers (dropout, noise) are the same if the run had one rank.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moma.data.batches.iterator import Batches, reshard
from moma.data.batches.packing import Batch
from moma.errors import UserError
from moma.progress import show_progress
from moma.recipe import Config
from moma.runs import Run
from moma.runtime.checkpoint import (
    load_checkpoint,
    read_rank_states,
    read_state,
    restore_random_state,
)
from moma.runtime.manifest import read_json
from moma.runtime.optimizer import learning_rate, make_optimizer
from moma.runtime.world import World, local_device
from moma.train.recipe import Recipe
from moma.train.restore import read_run_recipe
from moma.train.stages import find_source, objective_of, origin, prepare_model
from moma.train.step import Step, to_device
from moma.vocabulary import Vocabulary

# So many parameters are named, those with the largest gradients first.
_NAMED = 5


def replay(run: Run, quiet: bool = False) -> dict[str, Any]:
    """Go through the steps that led to a run's fault, and look into the one at fault.

    Returns:
        `step`, `checkpoint` (where it began), `same_batches` (whether the batches are those that
        the run had), `loss_before` and `gradient_norm` of the step before; `micro_batches` of the
        step, each with `rank`, losses by modality, the first part of the model whose output is
        not finite, and `documents`, by source the rows of those that the run had in it;
        `gradients`, the largest norms by parameter.

    Raises:
        UserError: the run has met no fault, or cannot be loaded.
    """
    folder = run.require().path / "fault"
    if not (folder / "fault.json").is_file():
        raise UserError(f"{run.path}: has met no fault (no fault/fault.json); nothing to replay")
    fault = read_json(folder / "fault.json")
    ranks = range(fault["world_size"])
    recipe = _uncompiled(read_run_recipe(run))
    vocabulary = Vocabulary.load(run.tokenizers.vocabulary)
    with closing(_Streams(recipe, vocabulary, len(ranks), fault["micro_batches"])) as streams:
        step, done = _restore(run, recipe, vocabulary, streams, fault["checkpoint"])
        before = _go_through(step, recipe, streams, done, fault["step"], quiet)
        batches = streams.draw()
    saved = [load_file(folder / f"rank-{rank}.safetensors") for rank in ranks]
    inspected = _inspect(step, batches, vocabulary)
    origins = [each for n in ranks for each in read_json(folder / f"rank-{n}.json")["documents"]]
    for told, rows in zip(inspected["micro_batches"], origins, strict=False):
        told["documents"] = _by_source(rows)
    return {
        "step": fault["step"],
        "checkpoint": fault["checkpoint"],
        "same_batches": all(map(_same, batches, saved)),
        **before,
        **inspected,
    }


class _Streams:
    """The micro-batches of all ranks, in one process."""

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary, ranks: int, micro_batches: int):
        self._micro_batches = micro_batches
        self._ranks = [
            Batches(recipe.data, vocabulary, recipe.seed, rank, ranks) for rank in range(ranks)
        ]

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on where perhaps another number of ranks stood; empty: from the beginning."""
        if states and len(states) != len(self._ranks):
            states = reshard(states, len(self._ranks))
        for stream, state in zip(self._ranks, states, strict=False):
            stream.set_state(state)

    def draw(self) -> list[list[Batch]]:
        """A step's, rank by rank."""
        return [[next(stream) for _ in range(self._micro_batches)] for stream in self._ranks]

    def close(self) -> None:
        for stream in self._ranks:
            stream.close()


def _restore(
    run: Run, recipe: Recipe, vocabulary: Vocabulary, streams: _Streams, checkpoint: str | None
) -> tuple[Step, int]:
    """The step and the number of steps done where the replay begins; the streams stand there."""
    world, config = World(local_device()), recipe.stage_config
    source = find_source(recipe, world) if checkpoint is None else None
    model = prepare_model(recipe, vocabulary, world, source)
    optimizer = make_optimizer(model, config.optimizer)
    step = Step(
        model,
        optimizer,
        objective_of(recipe, world.device),
        config.optimizer.clip,
        world,
        precision=recipe.engine.compute_dtype(world.device),
    )
    if checkpoint is None:
        streams.set_states(origin(recipe, source).data)
        torch.manual_seed(recipe.seed)
        return step, 0
    path = run.checkpoints / checkpoint
    if not path.is_dir():
        raise UserError(f"{path}: is gone; the fault cannot be replayed without it")
    rank_states = read_rank_states(path)
    load_checkpoint(path, model, optimizer, world)
    streams.set_states([each["data"] for each in rank_states])
    restore_random_state(rank_states[0])
    return step, read_state(path)["step"]


def _go_through(
    step: Step, recipe: Recipe, streams: _Streams, done: int, until: int, quiet: bool
) -> dict[str, Any]:
    """Take the steps before the step `until`; tells the last one's loss and gradient."""
    config = recipe.stage_config
    found: dict[str, Any] = {"loss_before": None, "gradient_norm": None}
    with show_progress(f"replay {recipe.run.name}", until, quiet) as report:
        for number in range(done, until - 1):
            together = [batch for its in streams.draw() for batch in its]
            sums, norm = step(together, learning_rate(config.optimizer, number, config.steps))
            loss = float(sums[0].sum() / sums[2].sum())
            found = {"loss_before": loss, "gradient_norm": float(norm)}
            report(number + 1, f"loss {loss:.3f}")
    return found


def _by_source(rows: Sequence[Sequence[tuple[str, int]]]) -> dict[str, list[int]]:
    """The documents of a micro-batch, each once."""
    found: dict[str, set[int]] = {}
    for source, document in (piece for row in rows for piece in row):
        found.setdefault(source, set()).add(document)
    return {source: sorted(documents) for source, documents in sorted(found.items())}


def _uncompiled(recipe: Recipe) -> Recipe:
    """Every part of the model can be watched."""
    stage: Config = recipe.stage_config.model_copy(update={"compile": False})
    return recipe.model_copy(update={recipe.stage: stage})


def _same(batches: Sequence[Batch], saved: dict[str, Tensor]) -> bool:
    return all(
        bool((saved[f"{index}.tokens_BS"].numpy() == batch.tokens_BS).all())
        for index, batch in enumerate(batches)
    )


def _inspect(
    step: Step, batches: Sequence[Sequence[Batch]], vocabulary: Vocabulary
) -> dict[str, Any]:
    """Forward and backward of each micro-batch, watching every part of the model."""
    model, told = step.model, []
    faulty: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and not first.isfinite().all():
                faulty.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    for rank, its in enumerate(batches):
        for batch in its:
            faulty.clear()
            with step.precision():
                losses = step.objective(model, to_device(batch, step.world.device))
            losses.objective.backward()
            mean_M = (losses.loss_M / losses.targets_M.clamp(min=1)).tolist()
            by_modality = {
                f"loss_{name}": loss
                for name, loss in zip(vocabulary.modalities, mean_M, strict=True)
            }
            told.append({"rank": rank, **by_modality, "not_finite": faulty[0] if faulty else None})
    for handle in handles:
        handle.remove()
    norms = {
        name: float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    # What is not finite comes first.
    order = sorted(norms, key=lambda name: (norms[name] == norms[name], -norms[name]))
    return {
        "micro_batches": told,
        "gradients": {name: norms[name] for name in order[:_NAMED]},
    }
