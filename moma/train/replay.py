"""A fault, seen again: the same steps from the checkpoint before it, then the step itself, open.

One process plays all ranks. Random numbers (dropout, noise) are the same if the run had one rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moma.data.batches import Batches, share_out
from moma.data.packing import Batch
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
        step, each with `rank`, losses by modality and the first part of the model whose output is
        not finite; `gradients`, the largest norms by parameter.

    Raises:
        UserError: the run has met no fault, or cannot be loaded.
    """
    folder = run.require().path / "fault"
    if not (folder / "fault.json").is_file():
        raise UserError(f"{run.path}: has met no fault (no fault/fault.json); nothing to replay")
    fault = read_json(folder / "fault.json")
    recipe = _uncompiled(read_run_recipe(run))
    world = World(local_device())
    vocabulary = Vocabulary.load(run.tokenizers.vocabulary)
    source = find_source(recipe, world) if fault["checkpoint"] is None else None
    model = prepare_model(recipe, vocabulary, world, source)
    config = recipe.stage_config
    optimizer = make_optimizer(model, config.optimizer)
    ranks = fault["world_size"]
    streams = [Batches(recipe.data, vocabulary, recipe.seed, rank, ranks) for rank in range(ranks)]
    done, micro_batches = 0, fault["micro_batches"]
    states = list(origin(recipe, source).data)
    torch.manual_seed(recipe.seed)
    if fault["checkpoint"] is not None:
        path = run.checkpoints / fault["checkpoint"]
        if not path.is_dir():
            raise UserError(f"{path}: is gone; the fault cannot be replayed without it")
        state, rank_states = read_state(path), read_rank_states(path)
        load_checkpoint(path, model, optimizer, world)
        done, states = state["step"], [each["data"] for each in rank_states]
        restore_random_state(rank_states[0])
    if states and len(states) != ranks:
        states = share_out(states, ranks)
    for stream, data in zip(streams, states, strict=False):
        stream.set_state(data)

    def draw() -> list[list[Batch]]:
        return [[next(stream) for _ in range(micro_batches)] for stream in streams]

    step = Step(
        model,
        optimizer,
        objective_of(recipe, world.device),
        config.optimizer.clip,
        world,
        precision=recipe.engine.compute_dtype(world.device),
    )
    found: dict[str, Any] = {"loss_before": None, "gradient_norm": None}
    with show_progress(f"replay {run.path.name}", fault["step"], quiet) as report:
        while done < fault["step"] - 1:
            together = [batch for its in draw() for batch in its]
            sums, norm = step(together, learning_rate(config.optimizer, done, config.steps))
            done += 1
            loss = float(sums[0].sum() / sums[2].sum())
            found = {"loss_before": loss, "gradient_norm": float(norm)}
            report(done, f"loss {loss:.3f}")
    batches = draw()
    for stream in streams:
        stream.close()
    saved = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(ranks)]
    return {
        "step": fault["step"],
        "checkpoint": fault["checkpoint"],
        "same_batches": all(map(_same, batches, saved)),
        **found,
        **_inspect(step, batches, vocabulary),
    }


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
