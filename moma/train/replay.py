"""Replay of a fault: the steps from the checkpoint before it, then the faulty step in detail.

Each rank of the replay plays as many ranks of the run; one process plays all of them. Random
numbers (dropout, noise) are those of the run if both have the same number of ranks.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moma.data.batches.iterator import Batches, reshard
from moma.data.batches.packing import Batch
from moma.data.remote.fetching import provide_data
from moma.errors import UserError
from moma.progress import show_progress
from moma.runs import Run
from moma.runtime.checkpoint import (
    load_checkpoint,
    read_rank_states,
    read_state,
    require_intact,
    restore_random_state,
)
from moma.runtime.optimizer import learning_rate
from moma.runtime.world import World, gather, raise_on_all_ranks, reporting_lost_ranks
from moma.train.fault import Fault, read_fault, read_fault_batches
from moma.train.recipe import Recipe
from moma.train.restore import read_run_recipe, trained_shards
from moma.train.stages import find_source_run, initial_state, make_step, prepare_model
from moma.train.step import Step, to_device
from moma.vocabulary import Vocabulary

# Number of parameters with the largest gradients that are shown.
_SHOWN_GRADIENTS = 5


def replay(run: Run, world: World, quiet: bool = False) -> dict[str, Any]:
    """Repeat the steps that led to a run's fault, and inspect the faulty step; all ranks together.

    Args:
        world: the ranks, whose number divides that of the run.

    Returns:
        `step`; `checkpoint`, where the replay started; `same_batches`, whether the batches are
        those of the run; `loss_before` and `gradient_norm` of the step before; `micro_batches` of
        the step, each with `rank`, losses by modality, `not_finite`, the first module whose output
        is not finite, and `documents` by source; `gradients`, the largest norms by parameter.

    Raises:
        UserError: the run has no saved fault, cannot be loaded, or had a number of ranks that those
            of the replay cannot share equally.
    """
    with ExitStack() as stack:
        stack.enter_context(reporting_lost_ranks(world))
        with raise_on_all_ranks(world):
            fault = read_fault(run.require())
            played = _played_ranks(fault, world)
            # Compiled layers would bypass forward hooks.
            recipe = read_run_recipe(run).without_compilation()
            saved = [read_fault_batches(run, rank) for rank in played]
            vocabulary = Vocabulary.load(run.require_tokenizers().vocabulary)
            provide_data(recipe.data, manifests=trained_shards(run))
            data = [
                stack.enter_context(
                    closing(Batches(recipe.data, vocabulary, recipe.seed, rank, fault.world_size))
                )
                for rank in played
            ]
        step, steps_done = _restore(run, recipe, vocabulary, data, fault, world)
        before = _take_steps(step, recipe, data, fault, steps_done, quiet or world.rank > 0)
        batches = dict(zip(played, _next_step(data, fault), strict=True))
        by_threshold = recipe.stage_config.routes_by_threshold(fault.step)
        micro_batches, gradients = _inspect(step, batches, by_threshold)
        documents = [sequences for _, own in saved for sequences in own]
        for result, sequences in zip(micro_batches, documents, strict=False):
            result["documents"] = _by_source(sequences)
        same = _are_same(batches.values(), [tensors for tensors, _ in saved])
        return {
            "step": fault.step,
            "checkpoint": fault.checkpoint,
            "same_batches": all(gather(same, world.writers)),
            **before,
            "micro_batches": [
                result for own in gather(micro_batches, world.writers) for result in own
            ],
            "gradients": gradients,
        }


def _played_ranks(fault: Fault, world: World) -> range:
    """The ranks of the run that this rank plays."""
    each, left = divmod(fault.world_size, world.size)
    if left:
        raise UserError(
            f"{world.size} ranks cannot replay the steps of {fault.world_size}; use a divisor of "
            f"{fault.world_size} as the number of ranks"
        )
    return range(world.rank * each, (world.rank + 1) * each)


def _restore(
    run: Run,
    recipe: Recipe,
    vocabulary: Vocabulary,
    data: Sequence[Batches],
    fault: Fault,
    world: World,
) -> tuple[Step, int]:
    """Restore model, optimizer and data; returns the step and the number of steps done."""
    if fault.checkpoint is None:
        source = find_source_run(recipe, world)
        step = make_step(recipe, prepare_model(recipe, vocabulary, world, source), world)
        _restore_data(data, initial_state(recipe, source).data, fault, world)
        torch.manual_seed(recipe.seed + world.rank)
        return step, 0
    path = run.checkpoints / fault.checkpoint
    with raise_on_all_ranks(world):
        if not path.is_dir():
            raise UserError(f"{path}: no longer exists; the fault cannot be replayed without it")
        require_intact(path)
    step = make_step(recipe, prepare_model(recipe, vocabulary, world, resumes=True), world)
    load_checkpoint(path, step.model, step.optimizers, world)
    rank_states = read_rank_states(path)
    _restore_data(data, [state["data"] for state in rank_states], fault, world)
    restore_random_state(rank_states[world.rank % len(rank_states)])
    return step, read_state(path)["step"]


def _restore_data(
    data: Sequence[Batches], states: Sequence[dict[str, Any]], fault: Fault, world: World
) -> None:
    if states:
        resharded = reshard(states, fault.world_size)
        for iterator, rank in zip(data, _played_ranks(fault, world), strict=True):
            iterator.set_state(resharded[rank])


def _next_step(data: Sequence[Batches], fault: Fault) -> list[list[Batch]]:
    """The micro-batches of one step, by rank."""
    return [[next(iterator) for _ in range(fault.micro_batches)] for iterator in data]


def _take_steps(
    step: Step, recipe: Recipe, data: Sequence[Batches], fault: Fault, done: int, quiet: bool
) -> dict[str, Any]:
    """Take the steps before the faulty one; returns the last one's loss and gradient norm."""
    config = recipe.stage_config
    last: dict[str, Any] = {"loss_before": None, "gradient_norm": None}
    with show_progress(f"replay {recipe.run.name}", fault.step, quiet) as progress:
        for number in range(done, fault.step - 1):
            batches = [batch for own in _next_step(data, fault) for batch in own]
            lr = learning_rate(config.optimizer, number, config.steps)
            sums, norm = step(batches, lr, by_threshold=config.routes_by_threshold(number + 1))
            loss = float(sums[0].sum() / sums[2].sum())
            last = {"loss_before": loss, "gradient_norm": float(norm)}
            progress(number + 1, f"loss {loss:.3f}")
    return last


def _inspect(
    step: Step, batches: Mapping[int, Sequence[Batch]], by_threshold: bool
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Run forward and backward of each micro-batch, with a hook on every module.

    Args:
        batches: the micro-batches of each rank of the run that this rank plays.
        by_threshold: whether the step routes by thresholds.

    Returns:
        A result for each of them, and the largest gradient norms of all ranks by parameter, NaN
        first.
    """
    names = {module: name for name, module in step.model.named_modules()}
    loss_function = step.threshold_loss if by_threshold else step.loss_function
    results: list[dict[str, Any]] = []
    nonfinite: list[str] = []

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and not first.isfinite().all():
            nonfinite.append(names[module])

    handles = [module.register_forward_hook(hook) for module, name in names.items() if name]
    for rank, own in batches.items():
        for batch in own:
            nonfinite.clear()
            with step.autocast():
                losses = loss_function(step.model, to_device(batch, step.world.device))
            losses.objective.backward()
            mean_M = (losses.loss_M / losses.targets_M.clamp(min=1)).tolist()
            by_name = zip(step.model.vocabulary.modalities, mean_M, strict=True)
            first = nonfinite[0] if nonfinite else None
            losses_by_name = {f"loss_{name}": loss for name, loss in by_name}
            results.append({"rank": rank, **losses_by_name, "not_finite": first})
    for handle in handles:
        handle.remove()
    parameters = step.model.named_parameters()
    norms = {name: _norm(p.grad, step.world) for name, p in parameters if p.grad is not None}
    order = sorted(norms, key=lambda name: (norms[name] == norms[name], -norms[name]))
    return results, {name: norms[name] for name in order[:_SHOWN_GRADIENTS]}


def _norm(gradient: Tensor, world: World) -> float:
    """Norm of a gradient of the sum over all micro-batches; FSDP's is a mean over ranks."""
    norm = gradient.norm()
    return world.size * float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _by_source(sequences: Sequence[Sequence[tuple[str, int]]]) -> dict[str, list[int]]:
    """Numbers of a micro-batch's documents, from 1, by source."""
    found: dict[str, set[int]] = {}
    for source, row in (piece for sequence in sequences for piece in sequence):
        found.setdefault(source, set()).add(row + 1)
    return {source: sorted(documents) for source, documents in sorted(found.items())}


def _are_same(batches: Iterable[Sequence[Batch]], saved: Sequence[dict[str, Tensor]]) -> bool:
    """Whether the micro-batches of each rank have the tokens that the run saved."""
    return all(
        name in tensors and bool((tensors[name].numpy() == batch.tokens_BS).all())
        for own, tensors in zip(batches, saved, strict=True)
        for name, batch in ((f"{index}.tokens_BS", batch) for index, batch in enumerate(own))
    )
