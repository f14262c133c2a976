"""Held-out losses, and images for fixed prompts, while a run trains.

every N steps:  held-out micro-batches → losses by modality under each routing → log record
                prompts → `RUN/validation/step-00001000.png`
"""

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import NO_LABEL, Batch
from moma.errors import SharedError, UserError, shorten
from moma.files import add_path_to_errors
from moma.model.attention_kernels import kernel_without_compilation
from moma.model.routing import ROUTINGS, RoutingName
from moma.model.transformer import Transformer
from moma.runs import Tokenizers
from moma.runtime.world import World, on_rank_0, raise_on_all_ranks
from moma.train.metrics import mean_losses
from moma.train.recipe import Recipe
from moma.train.step import LossFunction, next_token_loss, to_device
from moma.vocabulary import MODALITIES

if TYPE_CHECKING:
    from moma.generate.mixed import MixedModel


class Validation:
    """Measures a model in training, which it leaves as it was, like PyTorch's generators.

    All ranks call every method together.
    """

    def __init__(self, recipe: Recipe, model: Transformer, world: World, folder: Path):
        """Pack the held-out micro-batches.

        Args:
            recipe: what to measure, on what data; its seed determines the order of the documents,
                and the sampling of images.
            model: the model in training, sharded or not.
            folder: where sheets of images are written.

        Raises:
            UserError: the data holds no documents out, or a prompt leaves no space for an image.
        """
        self._config, self._data, self._seed = recipe.validation, recipe.data, recipe.seed
        self._model, self._world, self._folder = model, world, folder
        names: list[RoutingName] = ["choice"]
        if model.config.has_expert_choice:
            names.append("auxiliary" if model.causal_routing == ROUTINGS["auxiliary"] else "causal")
        self._loss_functions = {
            name: next_token_loss(routing=model.named_routing(name, raises=False)) for name in names
        }
        self._batches = self._own_batches() if self._config.every else []
        self._prompts = self._config.prompts
        if self._prompts:
            with raise_on_all_ranks(world):
                self._check_prompts()
        self._latest: tuple[float, int] | None = None  # a loss to minimize, and its step
        self._best: tuple[float, int] | None = None

    def is_due(self, step: int) -> bool:
        """Whether to measure after a step."""
        return self._config.every > 0 and step % self._config.every == 0

    def measure(self, step: int) -> dict[str, dict[str, float | None]]:
        """Compute held-out losses by routing, and write a sheet of images.

        Args:
            step: names the sheet.

        Returns:
            For `choice`, and if that is not causal, for `causal`, or `auxiliary` in the stage of
            auxiliary routers, the values of `mean_losses`; `gap`: by how much the latter exceed
            those for `choice`.
        """
        with _evaluating(self._model):
            losses = {
                str(name): self._losses(function) for name, function in self._loss_functions.items()
            }
            # From values that are not finite nothing can be sampled.
            if self._prompts and all(each["loss"] is not None for each in losses.values()):
                self._write_sheet(self._folder / f"step-{step:08d}.png")
        if self._config.keep_best is not None:
            value = list(losses.values())[-1][self._config.keep_best]  # causal, with routers
            self._latest = None if value is None else (value, step)
        if len(losses) > 1:
            choice, causal = losses.values()
            losses["gap"] = {
                name: None if loss is None or before is None else loss - before
                for (name, loss), before in zip(causal.items(), choice.values(), strict=True)
            }
        return losses

    def best_step(self, step: int) -> int | None:
        """The step of the best checkpoint, when one is saved after `step`; None if unknown."""
        if self._latest is not None and self._latest[1] == step:
            self._best = min(self._latest, self._best or self._latest)
        return self._best and self._best[1]

    def get_state(self) -> dict[str, Any]:
        """State to save, JSON-serializable."""
        return {"best": self._best, "measured": self._measured}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state from `get_state`; a loss that was measured otherwise is forgotten."""
        best = state["best"] if state["measured"] == self._measured else None
        self._best = None if best is None else (best[0], best[1])

    @property
    def _measured(self) -> list[Any]:
        """What the best loss is, as JSON."""
        return [self._config.keep_best, self._config.batches]

    def _own_batches(self) -> list[Batch]:
        """This rank's part of the micro-batches, the same number on all ranks.

        Every rank packs all of them, so that they do not depend on the number of ranks.
        """
        with closing(
            Batches(self._data, self._model.vocabulary, self._seed, split="held_out")
        ) as batches:
            found = list(islice(batches, self._config.batches))
        if not found:
            raise SharedError(
                f"validation.every: {self._data.path} holds no documents out; prepare it with a "
                "larger data.held_out, or set validation.every=0"
            )
        unlabeled = replace(found[0], labels_BS=np.full_like(found[0].labels_BS, NO_LABEL))
        found += [unlabeled] * (-len(found) % self._world.size)
        return found[self._world.rank :: self._world.size]

    def _losses(self, loss_function: LossFunction) -> dict[str, float | None]:
        device = self._world.device
        sums = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=device)
        for batch in self._batches:
            output = loss_function(self._model, to_device(batch, device))
            sums += torch.stack((output.loss_M, output.targets_M))
        losses = mean_losses(*self._world.sum(sums).cpu())
        return {
            name: loss if loss is not None and math.isfinite(loss) else None
            for name, loss in losses.items()
        }

    def _check_prompts(self) -> None:
        mixed = self._assemble()
        _ = mixed.codec  # raises if there is none
        space = mixed.context - self._model.vocabulary.image_span
        for prompt in self._prompts:
            if (tokens := len(mixed.encode([prompt]))) > space:
                raise UserError(
                    f"validation.prompts: '{shorten(prompt)}' has {tokens} tokens, but beside an "
                    f"image a sequence has space for {max(0, space)}; shorten it"
                )

    def _assemble(self) -> "MixedModel":
        from moma.generate.mixed import MixedModel

        tokenizers = Tokenizers(self._data.path)
        return MixedModel.assemble(self._model, tokenizers, self._data.sequence_length)

    def _write_sheet(self, path: Path) -> None:
        """Generate an image for each prompt; all ranks hold a part of the weights."""
        from moma.generate.sampling import Sampling
        from moma.generate.settings import Settings
        from moma.tokenizers.image.metrics import image_grid

        sampling = Sampling(seed=self._seed % 2**32)
        prompts = [[prompt] for prompt in self._prompts]
        # Without drafts, all ranks take the same number of passes, in which they share weights.
        answers = self._assemble().generate(prompts, Settings("image", sampling, drafts=0))
        images: list[Any] = [part for answer in answers for part in answer]

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            with add_path_to_errors(path):
                image_grid([images]).save(path)

        on_rank_0(self._world, write)


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients and compiled graphs, and back.

    Shapes vary in evaluation, and each would be compiled.
    """
    was_training, kernel = model.training, model.kernel
    model.eval()
    model.kernel = kernel_without_compilation(kernel)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
        model.kernel = kernel
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # FSDP keeps some weights gathered for a backward pass
