"""Replay of a fault: the steps from the checkpoint before it, then the faulty step in detail.

One process plays all ranks. Random numbers (dropout, noise) are the same if the run had one rank.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
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
    require_intact,
    restore_random_state,
)
from moma.runtime.optimizer import learning_rate
from moma.runtime.world import World, local_device
from moma.train.fault import read_fault, read_fault_batches
from moma.train.recipe import Recipe
from moma.train.restore import read_run_recipe
from moma.train.stages import find_source_run, initial_state, make_step, prepare_model
from moma.train.step import Step, to_device
from moma.vocabulary import Vocabulary

# Number of parameters with the largest gradients that are shown.
_SHOWN_GRADIENTS = 5


def replay(run: Run, quiet: bool = False) -> dict[str, Any]:
    """Repeat the steps that led to a run's fault, and inspect the faulty step.

    Returns:
        `step`; `checkpoint`, where the replay started; `same_batches`, whether the batches are
        those of the run; `loss_before` and `gradient_norm` of the step before; `micro_batches` of
        the step, each with `rank`, losses by modality, `not_finite`, the first module whose output
        is not finite, and `documents` by source; `gradients`, the largest norms by parameter.

    Raises:
        UserError: the run has no saved fault, or cannot be loaded.
    """
    fault = read_fault(run.require())
    recipe = _without_compilation(read_run_recipe(run))
    saved = [read_fault_batches(run, rank) for rank in range(fault.world_size)]
    vocabulary = Vocabulary.load(run.require_tokenizers().vocabulary)
    with closing(_Ranks(recipe, vocabulary, fault.world_size, fault.micro_batches)) as ranks:
        step, done = _restore(run, recipe, vocabulary, ranks, fault.checkpoint)
        before = _take_steps(step, recipe, ranks, done, fault.step, quiet)
        batches = ranks.next_step()
    inspected = _inspect(step, batches, vocabulary)
    documents = [micro_batch for _, own in saved for micro_batch in own]
    for result, sequences in zip(inspected["micro_batches"], documents, strict=False):
        result["documents"] = _by_source(sequences)
    return {
        "step": fault.step,
        "checkpoint": fault.checkpoint,
        "same_batches": all(
            _same(own, tensors) for own, (tensors, _) in zip(batches, saved, strict=True)
        ),
        **before,
        **inspected,
    }


class _Ranks:
    """The data iterators of all ranks, in one process."""

    def __init__(self, recipe: Recipe, vocabulary: Vocabulary, ranks: int, micro_batches: int):
        self._micro_batches = micro_batches
        self._iterators = [
            Batches(recipe.data, vocabulary, recipe.seed, rank, ranks) for rank in range(ranks)
        ]

    def set_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore the data state of each rank, resharded if their number differs."""
        if states and len(states) != len(self._iterators):
            states = reshard(states, len(self._iterators))
        for iterator, state in zip(self._iterators, states, strict=False):
            iterator.set_state(state)

    def next_step(self) -> list[list[Batch]]:
        """The micro-batches of one step, by rank."""
        return [[next(each) for _ in range(self._micro_batches)] for each in self._iterators]

    def close(self) -> None:
        for iterator in self._iterators:
            iterator.close()


def _restore(
    run: Run, recipe: Recipe, vocabulary: Vocabulary, ranks: _Ranks, checkpoint: str | None
) -> tuple[Step, int]:
    """Restore model, optimizer and data; returns the step and the number of steps done."""
    world = World(local_device())
    source = find_source_run(recipe, world) if checkpoint is None else None
    model = prepare_model(recipe, vocabulary, world, source)
    step = make_step(recipe, model, world)
    if checkpoint is None:
        ranks.set_states(initial_state(recipe, source).data)
        torch.manual_seed(recipe.seed)
        return step, 0
    path = run.checkpoints / checkpoint
    if not path.is_dir():
        raise UserError(f"{path}: no longer exists; the fault cannot be replayed without it")
    require_intact(path)
    rank_states = read_rank_states(path)
    load_checkpoint(path, model, step.optimizer, world)
    ranks.set_states([state["data"] for state in rank_states])
    restore_random_state(rank_states[0])
    return step, read_state(path)["step"]


def _take_steps(
    step: Step, recipe: Recipe, ranks: _Ranks, done: int, until: int, quiet: bool
) -> dict[str, Any]:
    """Take the steps before the step `until`; returns the last one's loss and gradient norm."""
    config = recipe.stage_config
    last: dict[str, Any] = {"loss_before": None, "gradient_norm": None}
    with show_progress(f"replay {recipe.run.name}", until, quiet) as progress:
        for number in range(done, until - 1):
            batches = [batch for own in ranks.next_step() for batch in own]
            sums, norm = step(batches, learning_rate(config.optimizer, number, config.steps))
            loss = float(sums[0].sum() / sums[2].sum())
            last = {"loss_before": loss, "gradient_norm": float(norm)}
            progress(number + 1, f"loss {loss:.3f}")
    return last


def _by_source(sequences: Sequence[Sequence[tuple[str, int]]]) -> dict[str, list[int]]:
    """The documents of a micro-batch by source, each once."""
    found: dict[str, set[int]] = {}
    for source, document in (piece for sequence in sequences for piece in sequence):
        found.setdefault(source, set()).add(document)
    return {source: sorted(documents) for source, documents in sorted(found.items())}


def _without_compilation(recipe: Recipe) -> Recipe:
    """The recipe without compilation, which would bypass forward hooks."""
    stage: Config = recipe.stage_config.model_copy(update={"compile": False})
    return recipe.model_copy(update={recipe.stage: stage})


def _same(batches: Sequence[Batch], saved: dict[str, Tensor]) -> bool:
    names = [f"{index}.tokens_BS" for index in range(len(batches))]
    return all(
        name in saved and bool((saved[name].numpy() == batch.tokens_BS).all())
        for name, batch in zip(names, batches, strict=True)
    )


def _inspect(
    step: Step, batches: Sequence[Sequence[Batch]], vocabulary: Vocabulary
) -> dict[str, Any]:
    """Forward and backward of each micro-batch, with a hook on every module."""
    model, results = step.model, []
    nonfinite: list[str] = []

    def make_hook(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and not first.isfinite().all():
                nonfinite.append(name)

        return hook

    handles = [
        module.register_forward_hook(make_hook(name))
        for name, module in model.named_modules()
        if name
    ]
    for rank, own in enumerate(batches):
        for batch in own:
            nonfinite.clear()
            with step.autocast():
                losses = step.objective(model, to_device(batch, step.world.device))
            losses.objective.backward()
            mean_M = (losses.loss_M / losses.targets_M.clamp(min=1)).tolist()
            by_modality = {
                f"loss_{name}": loss
                for name, loss in zip(vocabulary.modalities, mean_M, strict=True)
            }
            first = nonfinite[0] if nonfinite else None
            results.append({"rank": rank, **by_modality, "not_finite": first})
    for handle in handles:
        handle.remove()
    return {"micro_batches": results, "gradients": _largest_gradients(model)}


def _largest_gradients(model: nn.Module) -> dict[str, float]:
    """The largest gradient norms by parameter, NaN first."""
    norms = {
        name: float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    order = sorted(norms, key=lambda name: (norms[name] == norms[name], -norms[name]))
    return {name: norms[name] for name in order[:_SHOWN_GRADIENTS]}
