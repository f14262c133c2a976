"""Thresholds of a trained run from training micro-batches, without training; see `Router`."""

from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.model.routers import finite_cutoffs
from moma.model.routing import Routing
from moma.model.transformer import no_head, require_finite
from moma.progress import show_progress
from moma.runs import Run
from moma.train.restore import load_run, require_training_data, run_to_load
from moma.train.step import run_model, to_device
from moma.train.thresholds import thresholds_file, write_thresholds


@torch.no_grad()
def calibrate(run: Run, steps: int, quiet: bool = False) -> Path:
    """Compute the thresholds of a run's newest checkpoint by its data and batch shape.

    Args:
        run: the run.
        steps: number of micro-batches, whose cutoffs are averaged.
        quiet: whether to hide the progress bar.

    Returns:
        The file of the thresholds in the run's folder, which `load_run` reads.

    Raises:
        UserError: the model has no routers, or the data is not what it was trained on.
    """
    model, recipe = load_run(run)
    if not model.config.has_expert_choice:
        raise UserError(f"{run.path}: is causal by construction, so it needs no thresholds")
    require_training_data(run, recipe)
    for router in model.routers():
        router.cutoff_means_3E.zero_()
    device = model.embedding.weight.device
    cutoffs: list[torch.Tensor] = []
    with (
        closing(Batches(recipe.data, model.vocabulary, recipe.seed)) as batches,
        show_progress(f"calibrate {run.path.name}", steps, quiet) as report,
    ):
        for number, batch in enumerate(islice(batches, steps), 1):
            output = run_model(model, to_device(batch, device), Routing(), no_head)
            require_finite(output.nonfinite_L, f"{run.path}: ")
            cutoffs.append(finite_cutoffs(output.cutoffs))
            report(number)
    model.update_cutoffs(torch.stack(cutoffs).mean(0))
    write_thresholds(run, run_to_load(run).checkpoint, model)
    return thresholds_file(run)
