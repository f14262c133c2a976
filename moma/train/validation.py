"""Held-out losses, and images for fixed prompts, while a run trains.

every N steps:  held-out micro-batches → losses by modality under each routing → log record
                prompts → `RUN/validation/step-00001000.png`
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moma.data.batches.iterator import Batches
from moma.data.batches.packing import NO_LABEL, Batch
from moma.data.config import DataConfig
from moma.errors import SharedError
from moma.files import add_path_to_errors
from moma.model.routing import Routing, RoutingName
from moma.model.transformer import Transformer
from moma.runs import Tokenizers
from moma.runtime.world import World, on_rank_0
from moma.train.recipe import ValidationConfig
from moma.train.step import LossFunction, next_token_loss, to_device
from moma.vocabulary import IMAGE, MODALITIES, TEXT


def mean_losses(loss_M: Tensor, targets_M: Tensor) -> dict[str, float | None]:
    """Mean losses in nats per target, overall and by modality; None without a target."""
    sums = {
        "loss": (loss_M.sum(), targets_M.sum()),
        "loss_text": (loss_M[TEXT], targets_M[TEXT]),
        "loss_image": (loss_M[IMAGE], targets_M[IMAGE]),
    }
    return {name: float(loss / count) if count else None for name, (loss, count) in sums.items()}


class Validation:
    """Measures a model in training, which it leaves as it was, like PyTorch's generators.

    All ranks call every method together.
    """

    def __init__(
        self,
        config: ValidationConfig,
        data: DataConfig,
        seed: int,
        is_causal: bool,
        model: Transformer,
        world: World,
        folder: Path,
    ):
        """Pack the held-out micro-batches.

        Args:
            config: what to measure, and when.
            data: the prepared data.
            seed: determines the order of the documents, and the sampling of images.
            is_causal: whether the model can be used causally.
            model: the model in training, sharded or not.
            world: the ranks.
            folder: where sheets of images are written.

        Raises:
            UserError: the data holds no documents out.
        """
        self._config, self._data, self._seed = config, data, seed
        self._model, self._world, self._folder = model, world, folder
        self._is_causal = is_causal
        names: list[RoutingName] = ["choice"]
        if is_causal and model.config.has_routers:
            names.append("causal")
        self._loss_functions = {
            name: next_token_loss(routing=Routing(name, capacity="actual")) for name in names
        }
        self._batches = self._own_batches() if config.every else []
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
            For `choice`, and for `causal` if that is another routing and possible, the values of
            `mean_losses`.
        """
        with _evaluating(self._model):
            if self._is_causal and self._config.prompts:
                self._write_sheet(self._folder / f"step-{step:08d}.png")
            losses = {
                str(name): self._losses(function) for name, function in self._loss_functions.items()
            }
        if self._config.keep_best is not None:
            value = list(losses.values())[-1][self._config.keep_best]  # causal, if that is known
            self._latest = None if value is None else (value, step)
        return losses

    def best_step(self, step: int) -> int | None:
        """The step of the best checkpoint, when one is saved after `step`; None if unknown."""
        if self._latest is not None and self._latest[1] == step:
            self._best = min(self._latest, self._best or self._latest)
        return self._best and self._best[1]

    def get_state(self) -> list[Any] | None:
        """State to save, JSON-serializable."""
        return self._best and list(self._best)

    def set_state(self, state: list[Any] | None) -> None:
        """Restore a state from `get_state`."""
        self._best = None if state is None else (state[0], state[1])

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
        return mean_losses(*self._world.sum(sums).cpu())

    def _write_sheet(self, path: Path) -> None:
        """Generate an image for each prompt; all ranks hold a part of the weights."""
        from moma.generate.decode import Sampling
        from moma.generate.mixed import MixedModel
        from moma.tokenizers.image.metrics import image_grid

        context = self._data.sequence_length
        mixed = MixedModel.assemble(self._model, Tokenizers(self._data.path), context)
        sampling = Sampling(seed=self._seed % 2**32)
        answers = mixed.generate([[prompt] for prompt in self._config.prompts], "image", sampling)
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
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # FSDP keeps some weights gathered for a backward pass
