"""Training of the image codec: images in, a codec out.

    images → shuffled batches → encoder → codebook → decoder → L1 + L2 + commitment → Adam
                                                               (+ perceptual + adversarial)

Everything random depends on the seed and the step alone, and the whole state is one file that is
replaced in one move; so training that is interrupted and resumed ends bit for bit like training
that is not.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from moma.errors import StoppedError, UserError
from moma.recipe import Config
from moma.runtime.interrupt import interruption
from moma.runtime.world import World
from moma.tokenizers.image.batches import (
    first_images,
    order_of_batches,
    stack_images,
    step_seed,
)
from moma.tokenizers.image.codec import CodecConfig, ImageCodec
from moma.tokenizers.image.losses import (
    AdversarialConfig,
    Adversary,
    PerceptualConfig,
    PerceptualLoss,
)
from moma.tokenizers.image.state import Parts, restore_state, save_state

STATE_FILE = "training.safetensors"


class CodecTrainingConfig(Config):
    """How an image codec is trained.

    Attributes:
        max_documents: how many documents of each source give their images, from the first on.
        steps: optimizer steps.
        batch_size: images in a step.
        learning_rate: its peak, reached after `warmup_steps`; a cosine then lowers it to a
            hundredth.
        warmup_steps: steps over which the learning rate rises.
        quantizer_start_step: first steps, without the codebook; it starts on what the encoder then
        sees.
        mse_weight: weight of the squared error beside the absolute error.
        gradient_clip: largest norm of the gradient.
        ema_decay: share that a moving average of the weights keeps of itself at each step; the
            average is then the codec that training yields. 0 keeps no average.
        precision: of the products in encoder and decoder; `auto` is bfloat16 on a GPU and float32
            elsewhere.
        perceptual: a loss on features of VGG-16, if its weights are at hand.
        adversarial: a discriminator, if its weight is not 0.
        log_every: steps between two reports of progress.
        measure_every: steps between two measurements on held-out images, where they are logged.
        save_every: steps between two saves of the state, if there is a folder for it.
    """

    max_documents: int = Field(default=1_000_000, ge=1)
    steps: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
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
    def of_effect(self) -> dict[str, Any]:
        """The settings that decide what training yields, for JSON: those of reports do not."""
        return self.model_dump(mode="json", exclude={"log_every", "measure_every", "save_every"})

    def is_due(self, every: int, done: int) -> bool:
        """Whether something that is done `every` so many steps, and at the end, is due now."""
        return done % every == 0 or done == self.steps


@dataclass(frozen=True)
class CodecProgress:
    """One report: steps done, of how many, and the step's mean losses.

    Attributes:
        perceptual: None without a perceptual loss.
        adversarial, discriminator: weighted loss of the codec, and loss of the discriminator; None
            where it takes no part.
    """

    step: int
    steps: int
    loss: float
    absolute_error: float
    commitment: float
    learning_rate: float
    perceptual: float | None = None
    adversarial: float | None = None
    discriminator: float | None = None


Log = Callable[[CodecProgress, ImageCodec | None], None]


def train_codec(
    codec_config: CodecConfig,
    training_config: CodecTrainingConfig,
    images: Sequence[Tensor],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    progress: Callable[[CodecProgress], None] | None = None,
    log: Log | None = None,
) -> ImageCodec:
    """Train a codec from the start, or from the state that an interrupted run left in `folder`.

    Args:
        codec_config: shape of the codec.
        training_config: how to train it.
        images: tensors [3, H, W] of the codec's size, float in [−1, 1] or uint8; read when a
            batch needs them, so that a lazy sequence may hold any number.
        seed: decides initial weights, order of images and replaced codebook vectors.
        device: where to train.
        folder: where the state is saved and looked for; None saves nothing.
        progress: called every `log_every` steps and after the last.
        log: called with the same reports, and every `measure_every` steps and after the last with
            the codec of that moment too, once it has a codebook; it must not change it.

    Returns:
        The codec on `device`, in evaluation mode.

    Raises:
        UserError: no images, no decoder, or the saved state belongs to another configuration.
        StoppedError: SIGINT or SIGTERM arrived, and the state after the current step was saved.
    """
    if not len(images):
        raise UserError("codec training: there are no images")
    if not codec_config.decoder:
        raise UserError("codec.decoder = false: a codec without a decoder cannot be trained")
    config = training_config
    with (
        interruption(World(torch.device(device))) as stop_request,
        torch.random.fork_rng(_cuda_devices(device)),
    ):
        torch.manual_seed(seed)
        training = _Training(codec_config, config, device)
        identity = _identity(codec_config, config, seed, len(images))
        start = restore_state(folder / STATE_FILE, training.parts, identity) if folder else 0
        if folder:
            stop_request.install_handlers()
        for done, report in _steps(training, images, start, seed):
            if progress and config.is_due(config.log_every, done):
                progress(report())
            if log:
                _log(log, training, done, report)
            signal = stop_request.poll()
            if folder and (signal or config.is_due(config.save_every, done)):
                save_state(folder / STATE_FILE, training.parts, identity, done)
            if signal and done < config.steps:
                raise StoppedError(
                    f"{folder}: codec training stopped by {signal} after step {done}, which is "
                    "saved; the same command continues from there"
                )
    return training.result


class _Training:
    """A codec and all that trains it; `parts` is what has to be saved of it."""

    def __init__(
        self, codec: CodecConfig, config: CodecTrainingConfig, device: torch.device | str
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.codec = _new_codec(codec, device)
        self.optimizer = torch.optim.Adam(
            self.codec.parameters(), lr=config.learning_rate, betas=(0.9, 0.99)
        )
        self.average = _average(self.codec, config.ema_decay) if config.ema_decay else None
        self.perceptual, self.adversary = None, None
        if config.perceptual.weights is not None:
            self.perceptual = PerceptualLoss.load(config.perceptual.weights).to(device)
        if config.adversarial.weight:
            self.adversary = Adversary(config.adversarial, codec.image_size, device)
        automatic = config.precision == "auto" and self.device.type == "cuda"
        self.reduced = automatic or config.precision == "bfloat16"

    @property
    def parts(self) -> Parts:
        """Modules and optimizers by name."""
        parts: dict[str, nn.Module | Optimizer] = {
            "model": self.codec,
            "optimizer": self.optimizer,
        }
        if self.average is not None:
            parts["average"] = self.average
        if self.adversary is not None:
            parts["discriminator"] = self.adversary.discriminator
            parts["discriminator_optimizer"] = self.adversary.optimizer
        return parts

    @property
    def result(self) -> ImageCodec:
        """The codec as it would be used now: the average if one is kept, in evaluation mode."""
        codec = self.codec if self.average is None else cast(ImageCodec, self.average.module)
        return codec.eval()

    def step(self, batch_B3HW: Tensor, step: int) -> Callable[[], CodecProgress]:
        """One optimizer step; returns its report, not yet read from the device."""
        rate = _learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.reduced):
            reconstructions_B3HW, losses = self._losses(batch_B3HW, step)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.codec.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        if "adversarial" in losses and self.adversary is not None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.reduced):
                losses["discriminator"] = self.adversary.learn(reconstructions_B3HW, batch_B3HW)
        if self.average is not None:
            self.average.update_parameters(self.codec)
        return lambda: CodecProgress(
            step=step + 1,
            steps=self.config.steps,
            learning_rate=rate,
            **{name: value.item() for name, value in losses.items()},
        )

    def _losses(self, batch_B3HW: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstructions, and the losses by the names in `CodecProgress`."""
        config, codec = self.config, self.codec
        if step < config.quantizer_start_step:
            reconstructions_B3HW, commitment = (
                codec.autoencode(batch_B3HW),
                batch_B3HW.new_zeros(()),
            )
        else:
            reconstructions_B3HW, commitment = codec(batch_B3HW)
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
            generator_loss = self.adversary.loss(
                reconstructions_B3HW, reconstruction, codec.last_layer
            )
            losses["adversarial"] = generator_loss
            loss = loss + generator_loss
        return reconstructions_B3HW, {"loss": loss} | losses


def _steps(
    training: _Training, images: Sequence[Tensor], start: int, seed: int
) -> Iterator[tuple[int, Callable[[], CodecProgress]]]:
    """Train step after step; yields how many are done, and the report of the last."""
    config = training.config
    order = order_of_batches(len(images), config.batch_size, start, seed)
    for step in range(start, config.steps):
        torch.manual_seed(step_seed(seed, step))
        batch_B3HW = stack_images(images, next(order)).to(
            training.device, memory_format=torch.channels_last
        )
        training.codec.train()
        if step == config.quantizer_start_step:
            training.codec.start_codebook(first_images(images, seed).to(training.device))
        yield step + 1, training.step(batch_B3HW, step)


def _log(log: Log, training: "_Training", done: int, report: Callable[[], CodecProgress]) -> None:
    """Call the log if it is due: with the codec where that is measured and has a codebook."""
    config = training.config
    measured = config.is_due(config.measure_every, done)
    if measured or config.is_due(config.log_every, done):
        log(report(), training.result if measured and done > config.quantizer_start_step else None)


def _new_codec(config: CodecConfig, device: torch.device | str) -> ImageCodec:
    # The layout that convolutions are fastest in; mypy knows `to` without it.
    codec: Any = ImageCodec(config).to(device)
    return cast(ImageCodec, codec.to(memory_format=torch.channels_last).train())


def _average(codec: ImageCodec, decay: float) -> AveragedModel:
    """A moving average of the weights; the codebook, a moving average itself, is copied."""

    def blend(averages: Any, weights: Any, count: Any) -> None:
        # The first steps are soon forgotten, so that a short training is not mostly its start.
        share = ((1 + count) / (10 + count)).clamp(max=decay)
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1 - share)

    return AveragedModel(codec, multi_avg_fn=blend)


def _learning_rate(config: CodecTrainingConfig, step: int) -> float:
    """Linear rise, then half a cosine down to a hundredth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def _cuda_devices(device: torch.device | str) -> list[torch.device]:
    return [torch.device(device)] if torch.device(device).type == "cuda" else []


def _identity(codec: CodecConfig, training: CodecTrainingConfig, seed: int, count: int) -> str:
    """What has to be the same for a state to be resumed, as JSON."""
    facts: dict[str, Any] = {
        "codec": codec.model_dump(mode="json"),
        "training": training.of_effect,
        "seed": seed,
        "images": count,
    }
    return json.dumps(facts, sort_keys=True)
