"""Loss and perplexity of held-out documents, by modality, with expert choice or causal routing."""

from collections.abc import Iterable
from contextlib import closing

import torch
from torch import Tensor

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import Batch
from moma.errors import UserError
from moma.evaluate.summary import exponential, finite
from moma.model.routing import Routing, RoutingName
from moma.model.transformer import Transformer
from moma.progress import ProgressCallback, show_progress
from moma.train.metrics import mean_losses
from moma.train.recipe import Recipe
from moma.train.step import next_token_loss, to_device


def evaluate(
    model: Transformer, recipe: Recipe, routing: RoutingName, quiet: bool = False
) -> dict[str, float | None]:
    """Evaluate on every held-out document of the recipe's data, once.

    Args:
        model: the model, in evaluation mode.
        recipe: the run's recipe: its data, and its batch shape, on which expert choice depends.
        routing: `choice` over the batch, as in training but with actual capacity; causally by the
            `auxiliary` routers or by a `threshold`; `causal`: as `moma generate`.
        quiet: whether to hide the progress bar.

    Returns:
        `loss`, `loss_text`, `loss_image` in nats per target, `perplexity_text`,
        `perplexity_image`, and `tokens`, the number of targets; None where there is no target, or a
        perplexity is infinite.

    Raises:
        UserError: there are no held-out documents.
    """
    with (
        closing(Batches(recipe.data, model.vocabulary, recipe.seed, split="held_out")) as batches,
        show_progress(f"evaluate ({routing})", None, quiet) as report,
    ):
        found = sum_losses(model, recipe, model.named_routing(routing), batches, report)
    loss_M, targets_M = found
    means = mean_losses(loss_M, targets_M)
    text, image = means["loss_text"], means["loss_image"]
    return means | {
        "perplexity_text": None if text is None else finite(exponential(text)),
        "perplexity_image": None if image is None else finite(exponential(image)),
        "tokens": int(targets_M.sum()),
    }


@torch.no_grad()
def sum_losses(
    model: Transformer,
    recipe: Recipe,
    routing: Routing,
    batches: Iterable[Batch],
    report: ProgressCallback = lambda done, note="": None,
) -> Tensor:
    """Losses and targets of a recipe's held-out micro-batches, summed by modality, fp64 [2, M].

    Raises:
        UserError: there are none.
    """
    loss_function, device = next_token_loss(routing=routing), model.embedding.weight.device
    sums_2M = torch.zeros(2, len(model.vocabulary.modalities), dtype=torch.float64)
    for number, batch in enumerate(batches, 1):
        output = loss_function(model, to_device(batch, device))
        sums_2M += torch.stack((output.loss_M, output.targets_M)).cpu()
        report(number, "batches")
    if not sums_2M[1].any():
        raise UserError(
            f"{recipe.data.path}: no held-out documents; increase data.held_out and train a new run"
        )
    return sums_2M
