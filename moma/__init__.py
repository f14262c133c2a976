"""Mixed-modal language models with modality-aware sparsity (MoMa, arXiv 2407.21770)."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moma.generate.mixed import MixedModel


def load(
    run: str | PathLike[str],
    routing: Literal["causal", "threshold", "auxiliary", "half"] = "causal",
) -> "MixedModel":
    """Load a trained run as a model that reads and generates text and images.

    Args:
        run: its folder.
        routing: by the thresholds that were kept while training, or by trained auxiliary routers;
            `causal`: by thresholds, if there are any.

    Raises:
        moma.errors.UserError: the folder is not a run, has no checkpoint, or its model
            cannot use the routing.
    """
    from moma.generate.mixed import MixedModel
    from moma.model.decoding import prepare_decoding
    from moma.runs import Run
    from moma.train.restore import load_run, require_routing

    folder = Run(Path(run))
    model, recipe = load_run(folder)
    require_routing(folder, model, routing)
    if routing != "causal":
        model.causal_routing = model.named_routing(routing)
    prepare_decoding(model)
    return MixedModel.assemble(model, folder.tokenizers, recipe.data.sequence_length)
