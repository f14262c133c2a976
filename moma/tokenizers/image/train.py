"""Training of the image codec.

    images → shuffled batches → encoder → codebook → decoder → L1 + L2 + commitment → Adam
                                                               (+ perceptual + adversarial)

All randomness follows from the seed and the step, so interrupted training continues exactly. The
ranks of a job divide each batch; every rank holds the whole codec, which is small. The codebook
sees the latents of all ranks, so that it learns as with one.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam, Optimizer
from torch.optim.swa_utils import AveragedModel

from moma.data.documents import unit_hash
from moma.errors import SharedError, StoppedError, UserError
from moma.recipe import Config
from moma.runtime.interrupt import Interruption, interruption
from moma.runtime.optimizer import scheduled_rate
from moma.runtime.tracking import Record
from moma.runtime.world import World, raise_on_all_ranks
from moma.tokenizers.image.codec import CodecConfig, ImageCodec
from moma.tokenizers.image.losses import (
    AdversarialConfig,
    Adversary,
    PerceptualConfig,
    PerceptualLoss,
)
from moma.tokenizers.image.metrics import measure_codec, sample_sheet, stack_images

if TYPE_CHECKING:
    from moma.tokenizers.image.state import TrainingFolder

_IMAGES_FOR_CODEBOOK = 256
_MEASURED_IMAGES = 256


class CodecTrainingConfig(Config):
    """How an image codec is trained.

    Attributes:
        max_documents: maximum number of documents of each source whose images are used; of more,
            they are drawn at random.
        steps: number of optimizer steps.
        batch_size: images per step.
        learning_rate: peak learning rate, reached after `warmup_steps`; a cosine then lowers it to
            a hundredth.
        warmup_steps: steps over which the learning rate rises to the peak.
        quantizer_start_step: first step with the codebook, which is then initialized from the
            encoder's outputs; earlier steps skip it.
        mse_weight: weight of the squared error; that of the absolute error is 1.
        gradient_clip: a gradient with a larger norm is scaled down to this norm.
        ema_decay: decay of a moving average of the weights, which training then returns; 0: no
            average.
        precision: of the products in encoder and decoder; `auto` is bfloat16 on a GPU and float32
            elsewhere.
        perceptual: a loss on features of VGG-16, used if its weights are given.
        adversarial: a discriminator, used if its weight is not 0.
        log_every: steps between two log records.
        measure_every: steps between two measurements on held-out images.
        save_every: steps between two checkpoints.
    """

    max_documents: int = Field(default=1_000_000, ge=1, le=10**9)
    steps: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=32, ge=1, le=2**20)
    learning_rate: float = Field(default=1e-3, gt=0, le=10**6)
    warmup_steps: int = Field(default=100, ge=0)
    quantizer_start_step: int = Field(default=200, ge=0)
    mse_weight: float = Field(default=1.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    log_every: int = Field(default=50, ge=1)
    measure_every: int = Field(default=500, ge=1)
    save_every: int = Field(default=500, ge=1)

    @property
    def relevant_values(self) -> dict[str, Any]:
        """The values that affect the trained codec, not those of logging; JSON-serializable."""
        return self.model_dump(mode="json", exclude={"log_every", "measure_every", "save_every"})

    def is_due(self, every: int, step: int) -> bool:
        """Whether what is done every `every` steps, and at the end, is done after `step`."""
        return step % every == 0 or step == self.steps


def train_codec(
    codec_config: CodecConfig,
    config: CodecTrainingConfig,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor] = (),
    *,
    seed: int = 0,
    world: World = World(torch.device("cpu")),  # noqa: B008  frozen
    folder: Path | None = None,
    progress: Callable[[Record], None] | None = None,
) -> ImageCodec:
    """Train a codec, or resume an interrupted training.

    Args:
        images: tensors [3, H, W] of the codec's size, float in [−1, 1] or uint8; read when a
            batch needs them, so that a lazy sequence can have any length.
        held_out: further images to measure the codec on; without them, `images` are used.
        world: the ranks, which call this together; they divide each batch.
        seed: determines the initial weights, the order of images and replaced codebook vectors.
        folder: of checkpoints, log and samples (see `state.py`); by default nothing is written.

    Returns:
        The codec on the rank's device, in evaluation mode.

    Raises:
        UserError: there are no images or no decoder, the folder is from another training, or the
            batch size is no multiple of the number of ranks.
        StoppedError: SIGINT or SIGTERM arrived, and a checkpoint was written.
    """
    if not len(images):
        raise UserError("codec training: there are no images; add a source of images")
    if not codec_config.decoder:
        raise UserError("codec.decoder = false: training needs the decoder; set it to true")
    if config.batch_size % world.size:
        raise UserError(
            f"codec_training.batch_size = {config.batch_size}: must be a multiple of the "
            f"{world.size} ranks"
        )
    cuda_devices = [world.device] if world.device.type == "cuda" else []
    with ExitStack() as stack:
        stop_request = stack.enter_context(interruption(world))
        stack.enter_context(torch.random.fork_rng(cuda_devices))
        torch.manual_seed(seed)
        trainer = CodecTrainer(codec_config, config, images, held_out, seed, world)
        output = stack.enter_context(closing(trainer.open(folder))) if folder else None
        if output:
            stop_request.install_handlers()
        trainer.run_to_end(output, stop_request, progress)
    return trainer.result


class CodecTrainer:
    """A codec, everything that is trained with it, and its images.

    Attributes:
        modules: the modules that are trained, by name.
    """

    def __init__(
        self,
        codec_config: CodecConfig,
        config: CodecTrainingConfig,
        images: Sequence[Tensor],
        held_out: Sequence[Tensor],
        seed: int,
        world: World,
    ):
        """Build it; the arguments are those of `train_codec`."""
        device = world.device
        self.config, self.device, self._seed, self._world = config, device, seed, world
        self._images, self._held_out = images, held_out
        codec: Any = ImageCodec(codec_config).to(device)
        # The memory format in which convolutions are fastest.
        self.codec = cast(ImageCodec, codec.to(memory_format=torch.channels_last).train())
        self.optimizer = Adam(self.codec.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.modules = nn.ModuleDict({"codec": self.codec})
        self.average, self.perceptual, self.adversary = None, None, None
        if config.ema_decay:
            self.average = _average(self.codec, config.ema_decay)
            self.modules["average"] = self.average
        if config.perceptual.weights is not None:
            self.perceptual = PerceptualLoss.load(config.perceptual.weights).to(device)
        if config.adversarial.weight:
            self.adversary = Adversary(config.adversarial, codec_config.image_size, world)
            self.modules["discriminator"] = self.adversary.discriminator
        is_automatic = config.precision == "auto" and device.type == "cuda"
        self._is_reduced = is_automatic or config.precision == "bfloat16"

    @property
    def result(self) -> ImageCodec:
        """The codec as training returns it: the average if there is one, in evaluation mode."""
        codec = self.codec if self.average is None else cast(ImageCodec, self.average.module)
        return codec.eval()

    def open(self, folder: Path) -> "TrainingFolder":
        """Open the folder of the training, and restore its newest checkpoint."""
        # Recipes import this module, and most commands write no checkpoints.
        from moma.tokenizers.image.state import TrainingFolder

        made_with = {
            "codec": self.codec.config.model_dump(mode="json"),
            "training": self.config.relevant_values,
            "seed": self._seed,
            "images": len(self._images),
        }
        return TrainingFolder(folder, made_with, self.modules, self._optimizers, self._world)

    def run_to_end(
        self,
        output: "TrainingFolder | None",
        stop_request: Interruption,
        progress: Callable[[Record], None] | None,
    ) -> None:
        """Train to the last step, with log records and checkpoints.

        Raises:
            StoppedError: a signal arrived, and a checkpoint was written.
        """
        config = self.config
        for step in range(output.steps_done if output else 0, config.steps):
            losses, done = self.take_step(step), step + 1
            self.report(done, losses, output, progress)
            signal = stop_request.poll()
            if output and (signal or config.is_due(config.save_every, done)):
                output.save(done)
            if output and signal and done < config.steps:
                output.wait()
                raise StoppedError(
                    f"{output.path}: codec training stopped by {signal} after step {done}, which "
                    "is saved; run the same command to resume"
                )
        if output:
            output.wait()

    def take_step(self, step: int) -> dict[str, Tensor | float]:
        """Do step 0, 1, …; returns losses and learning rate by their names in log records."""
        config, world = self.config, self._world
        torch.manual_seed(_step_seed(self._seed, step))
        indices = batch_indices(len(self._images), config.batch_size, step, self._seed)
        own = len(indices) // world.size
        indices = indices[world.rank * own : (world.rank + 1) * own]
        batch_B3HW = self._stack(indices).to(memory_format=torch.channels_last)
        self.codec.train()
        if step == config.quantizer_start_step:
            sample = min(len(self._images), _IMAGES_FOR_CODEBOOK)
            first = batch_indices(len(self._images), sample, 0, self._seed)
            self.codec.start_codebook(self._stack(first))
        rate = scheduled_rate(
            config.learning_rate,
            step,
            warmup=config.warmup_steps,
            decay_start=config.warmup_steps,
            last_step=config.steps,
            final_ratio=0.01,
            decay="cosine",
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_reduced):
            reconstructions_B3HW, losses = self._losses(batch_B3HW, step)
        self.optimizer.zero_grad(set_to_none=True)
        objective = losses["loss"]
        if world.size > 1:  # the commitment loss is that of all ranks already
            commitment = losses["commitment"]
            objective = (objective - commitment) / world.size + commitment
        objective.backward()
        world.sum_gradients(self.codec.parameters())
        nn.utils.clip_grad_norm_(self.codec.parameters(), config.gradient_clip)
        self.optimizer.step()
        if self.adversary is not None and "adversarial" in losses:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_reduced):
                losses["discriminator"] = self.adversary.learn(reconstructions_B3HW, batch_B3HW)
        if self.average is not None:
            self.average.update_parameters(self.codec)
        return {name: loss.detach() for name, loss in losses.items()} | {"learning_rate": rate}

    def report(
        self,
        step: int,
        losses: Mapping[str, Tensor | float],
        output: "TrainingFolder | None",
        progress: Callable[[Record], None] | None,
    ) -> None:
        """Log the result of a step if that is due, with the codec's metrics if they are due.

        Raises:
            SharedError: a loss, or what the codec computes, is not finite.
        """
        config = self.config
        is_measured = config.is_due(config.measure_every, step)
        if not is_measured and not config.is_due(config.log_every, step):
            return
        values = torch.tensor([*map(float, losses.values())], dtype=torch.float64).to(self.device)
        if self._world.size > 1:
            values = self._world.sum(values) / self._world.size
        record = {"step": step, **dict(zip(losses, values.tolist(), strict=True))}
        if not values.isfinite().all():
            advice = f"delete {output.path} and lower" if output else "lower"
            raise SharedError(
                f"codec: at step {step} a loss is not finite: its training has diverged; {advice} "
                "codec_training.learning_rate or the weights of the losses"
            )
        samples = None
        if output and is_measured and step > config.quantizer_start_step:
            with raise_on_all_ranks(self._world, while_writing=True):
                if self._world.rank == 0:
                    codec = self.result
                    shown = self._held_out if len(self._held_out) else self._images
                    metrics = measure_codec(codec, self._images, self._held_out, _MEASURED_IMAGES)
                    record |= metrics.model_dump()
                    samples = sample_sheet(codec, shown)
        if self._world.rank:
            return
        if output:
            output.write(record, samples)
        if progress:
            progress(record)

    def _stack(self, indices: Sequence[int]) -> Tensor:
        with raise_on_all_ranks(self._world, while_writing=True):
            return stack_images(self._images, indices).to(self.device)

    def _optimizers(self, steps_done: int) -> tuple[Optimizer, ...]:
        if self.adversary is None or steps_done <= self.config.adversarial.start_step:
            return (self.optimizer,)
        return (self.optimizer, self.adversary.optimizer)

    def _losses(self, batch_B3HW: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstructions, and losses by their names in log records."""
        config, codec = self.config, self.codec
        if step < config.quantizer_start_step:
            reconstructions_B3HW = codec.autoencode(batch_B3HW)
            commitment = batch_B3HW.new_zeros(())
        else:
            vectors_BDhw, commitment = codec.quantize(self._world.join(codec.latents(batch_B3HW)))
            own_BDhw = vectors_BDhw.chunk(self._world.size)[self._world.rank]
            reconstructions_B3HW = codec.images(own_BDhw)
        reconstructions_B3HW = reconstructions_B3HW.float()
        absolute = functional.l1_loss(reconstructions_B3HW, batch_B3HW)
        losses = {"absolute_error": absolute, "commitment": commitment}
        loss = absolute + config.mse_weight * functional.mse_loss(reconstructions_B3HW, batch_B3HW)
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(reconstructions_B3HW, batch_B3HW)
            loss = loss + config.perceptual.weight * losses["perceptual"]
        reconstruction = loss
        loss = loss + commitment
        if self.adversary is not None and step >= config.adversarial.start_step:
            losses["adversarial"] = self.adversary.loss(
                reconstructions_B3HW, reconstruction, codec.last_layer
            )
            loss = loss + losses["adversarial"]
        return reconstructions_B3HW, {"loss": loss} | losses


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Which of `count` images are the batch of step 0, 1, …: one shuffled epoch after another."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(count, seed, at // count)[at % count] for at in positions]


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(_step_seed(seed, epoch, "order"))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _step_seed(seed: int, step: int, purpose: str = "step") -> int:
    """A seed for each step, hashed: consecutive seeds give correlated random numbers."""
    return int(unit_hash(f"{purpose} {seed} {step}") * 2**53)


def _average(codec: ImageCodec, decay: float) -> AveragedModel:
    """A moving average of the weights; the codebook, a moving average itself, is copied."""

    def blend(averages: Any, weights: Any, count: Any) -> None:
        # The first steps are forgotten soon, so that they do not dominate a short training.
        share = ((1 + count) / (10 + count)).clamp(max=decay)
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - share)

    return AveragedModel(codec, multi_avg_fn=blend)
