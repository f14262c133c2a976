"""Loss and perplexity of held-out documents, by modality, with expert choice or causal routing."""

import torch

from moma.data.batches.iterator import Batches
from moma.errors import UserError
from moma.evaluate.summary import exponential, finite
from moma.model.routing import RoutingName
from moma.model.transformer import Transformer
from moma.progress import show_progress
from moma.train.recipe import Recipe
from moma.train.step import next_token_loss, to_device
from moma.train.validation import mean_losses
from moma.vocabulary import MODALITIES


@torch.no_grad()
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
    device = model.embedding.weight.device
    batches = Batches(recipe.data, model.vocabulary, seed=recipe.seed, split="held_out")
    loss_function = next_token_loss(routing=model.named_routing(routing))
    loss_M, targets_M = torch.zeros(2, len(MODALITIES), dtype=torch.float64)
    with show_progress(f"evaluate ({routing})", None, quiet) as report:
        for number, batch in enumerate(batches, 1):
            losses = loss_function(model, to_device(batch, device))
            loss_M += losses.loss_M.cpu()
            targets_M += losses.targets_M.cpu()
            report(number, "batches")
    if targets_M.sum() == 0:
        raise UserError(
            f"{recipe.data.path}: no held-out documents; increase data.held_out and train a new run"
        )
    means = mean_losses(loss_M, targets_M)
    text, image = means["loss_text"], means["loss_image"]
    return means | {
        "perplexity_text": None if text is None else finite(exponential(text)),
        "perplexity_image": None if image is None else finite(exponential(image)),
        "tokens": int(targets_M.sum()),
    }
