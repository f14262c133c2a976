"""Training of the image codec: pictures in, a codec and what it achieves out.

    pictures → shuffled batches → encoder → codebook → decoder → L1 + L2 + commitment → Adam

Everything random depends on the seed and the step alone, and the whole state is one file that is
replaced in one move; so training that is interrupted and resumed ends bit for bit like training
that is not.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from moma.data.documents import unit_hash
from moma.errors import UserError
from moma.recipe import Config
from moma.tokenizers.image import CodecConfig, ImageCodec, in_batches

_STATE_FILE = "training.safetensors"
_MODEL, _OPTIMIZER = "model.", "optimizer."
_STARTING_PICTURES = 256
_MEASURED_PICTURES = 2048
_LARGEST_VALUE = 2.0  # pictures span [−1, 1]


class CodecTrainingConfig(Config):
    """How an image codec is trained.

    Attributes:
        documents: how many documents of each source give their pictures, from the first on.
        steps: optimizer steps.
        batch_size: pictures in a step.
        learning_rate: its peak, reached after `warmup_steps`; a cosine then lowers it to a
            hundredth.
        warmup_steps: steps over which the learning rate rises.
        free_steps: first steps, without the codebook; it starts on what the encoder then sees.
        squared_weight: weight of the squared error beside the absolute error.
        gradient_clip: largest norm of the gradient.
        log_every: steps between two reports of progress.
        save_every: steps between two saves of the state, if there is a folder for it.
    """

    documents: int = Field(default=1_000_000, ge=1)
    steps: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    free_steps: int = Field(default=200, ge=0)
    squared_weight: float = Field(default=1.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    log_every: int = Field(default=50, ge=1)
    save_every: int = Field(default=500, ge=1)


@dataclass(frozen=True)
class CodecProgress:
    """One report: steps done, of how many, and the step's mean losses."""

    step: int
    steps: int
    loss: float
    absolute_error: float
    commitment: float
    learning_rate: float


@dataclass(frozen=True)
class CodecMetrics:
    """What a codec achieves.

    Attributes:
        psnr: peak signal-to-noise ratio of reconstructions, in dB, over all pictures at once.
        codes_used: share of the codebook that these pictures use.
        perplexity: exp of the entropy of the codes' frequencies.
        pictures: how many pictures were measured.
    """

    psnr: float
    codes_used: float
    perplexity: float
    pictures: int


def train_codec(
    codec_config: CodecConfig,
    training_config: CodecTrainingConfig,
    pictures: Sequence[Tensor],
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    progress: Callable[[CodecProgress], None] | None = None,
) -> ImageCodec:
    """Train a codec from the start, or from the state that an interrupted run left in `folder`.

    Args:
        codec_config: shape of the codec.
        training_config: how to train it.
        pictures: tensors [3, H, W] of the codec's size, float in [−1, 1] or uint8; read when a
            batch needs them, so that a lazy sequence may hold any number.
        seed: decides initial weights, order of pictures and replaced codebook vectors.
        device: where to train.
        folder: where the state is saved and looked for; None saves nothing.
        progress: called every `log_every` steps and after the last.

    Returns:
        The codec on `device`, in evaluation mode.

    Raises:
        UserError: no pictures, or the saved state belongs to another configuration.
    """
    if not len(pictures):
        raise UserError("codec training: there are no pictures")
    config = training_config
    with torch.random.fork_rng(_cuda_devices(device)):
        torch.manual_seed(seed)
        codec = _new_codec(codec_config, device)
        optimizer = torch.optim.Adam(codec.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        identity = _identity(codec_config, config, seed, len(pictures))
        start = _restore(folder, codec, optimizer, identity) if folder else 0
        order = _order(len(pictures), config.batch_size, start, seed)
        for step in range(start, config.steps):
            torch.manual_seed(_step_seed(seed, step))
            batch_B3HW = _batch(pictures, next(order)).to(device, memory_format=torch.channels_last)
            if step == config.free_steps:
                codec.start_codebook(_first_pictures(pictures, seed).to(device))
            report = _train_step(codec, optimizer, batch_B3HW, config, step)
            done = step + 1
            if progress and (done % config.log_every == 0 or done == config.steps):
                progress(report())
            if folder and (done % config.save_every == 0 or done == config.steps):
                _save(folder, codec, optimizer, identity, done)
    return codec.eval()


def measure_codec(
    codec: ImageCodec, pictures: Sequence[Tensor], batch_size: int = 64
) -> CodecMetrics:
    """Reconstruct pictures and report error and use of codes.

    Of more than 2,048 pictures that many are measured, evenly spread.

    Args:
        codec: the codec, on any device.
        pictures: as for `train_codec`; best ones that it was not trained on.
        batch_size: pictures at a time.

    Raises:
        UserError: there are no pictures.
    """
    if not len(pictures):
        raise UserError("codec measurement: there are no pictures")
    chosen = range(0, len(pictures), math.ceil(len(pictures) / _MEASURED_PICTURES))
    device = codec.codebook.device
    squared, values = 0.0, 0
    counts = torch.zeros(len(codec.codebook), dtype=torch.int64)
    for part in in_batches(len(chosen), batch_size):
        batch_B3HW = _batch(pictures, list(chosen[part])).to(device)
        codes_BL = codec.encode(batch_B3HW)
        squared += functional.mse_loss(codec.decode(codes_BL), batch_B3HW, reduction="sum").item()
        values += batch_B3HW.numel()
        counts += codes_BL.flatten().bincount(minlength=len(counts)).cpu()
    shares = counts[counts > 0] / counts.sum()
    return CodecMetrics(
        psnr=10 * math.log10(_LARGEST_VALUE**2 * values / max(squared, 1e-12)),
        codes_used=(counts > 0).double().mean().item(),
        perplexity=shares.log().mul(shares).sum().neg().exp().item(),
        pictures=len(chosen),
    )


def _new_codec(config: CodecConfig, device: torch.device | str) -> ImageCodec:
    # The layout that convolutions are fastest in; mypy knows `to` without it.
    codec: Any = ImageCodec(config).to(device)
    return cast(ImageCodec, codec.to(memory_format=torch.channels_last).train())


def _train_step(
    codec: ImageCodec,
    optimizer: torch.optim.Optimizer,
    batch_B3HW: Tensor,
    config: CodecTrainingConfig,
    step: int,
) -> Callable[[], CodecProgress]:
    """One optimizer step; returns its report, not yet read from the device."""
    rate = _learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    if step < config.free_steps:
        drawn_B3HW, commitment = codec.autoencode(batch_B3HW), batch_B3HW.new_zeros(())
    else:
        drawn_B3HW, commitment = codec(batch_B3HW)
    absolute = functional.l1_loss(drawn_B3HW, batch_B3HW)
    loss = (
        absolute + config.squared_weight * functional.mse_loss(drawn_B3HW, batch_B3HW) + commitment
    )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(codec.parameters(), config.gradient_clip)
    optimizer.step()
    return lambda: CodecProgress(
        step + 1, config.steps, loss.item(), absolute.item(), commitment.item(), rate
    )


def _learning_rate(config: CodecTrainingConfig, step: int) -> float:
    """Linear rise, then half a cosine down to a hundredth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def _order(count: int, batch_size: int, start: int, seed: int) -> Iterator[list[int]]:
    """Indices of the batches from step `start` on: one shuffled epoch after the other."""
    position = start * batch_size
    epoch, indices = -1, []
    while True:
        batch = []
        for place in range(position, position + batch_size):
            if place // count != epoch:
                epoch = place // count
                draw = torch.Generator().manual_seed(_step_seed(seed, epoch, "order"))
                indices = torch.randperm(count, generator=draw).tolist()
            batch.append(indices[place % count])
        position += batch_size
        yield batch


def _batch(pictures: Sequence[Tensor], indices: list[int]) -> Tensor:
    """Pictures stacked as floats in [−1, 1]."""
    batch_B3HW = torch.stack([pictures[index] for index in indices])
    if batch_B3HW.dtype == torch.uint8:
        return batch_B3HW.float() / 255 * 2 - 1
    return batch_B3HW


def _first_pictures(pictures: Sequence[Tensor], seed: int) -> Tensor:
    """A random sample that the codebook starts on."""
    sample = min(len(pictures), _STARTING_PICTURES)
    return _batch(pictures, next(_order(len(pictures), sample, 0, seed)))


def _step_seed(seed: int, step: int, purpose: str = "step") -> int:
    """A seed for each step: consecutive seeds give unrelated numbers only if they are hashed."""
    return int(unit_hash(f"{purpose} {seed} {step}") * 2**53)


def _cuda_devices(device: torch.device | str) -> list[torch.device]:
    return [torch.device(device)] if torch.device(device).type == "cuda" else []


def _identity(codec: CodecConfig, training: CodecTrainingConfig, seed: int, count: int) -> str:
    """What has to be the same for a state to be resumed, as JSON."""
    ignored = {"log_every", "save_every"}
    facts: dict[str, Any] = {
        "codec": codec.model_dump(mode="json"),
        "training": training.model_dump(mode="json", exclude=ignored),
        "seed": seed,
        "pictures": count,
    }
    return json.dumps(facts, sort_keys=True)


def _save(
    folder: Path, codec: ImageCodec, optimizer: torch.optim.Optimizer, identity: str, step: int
) -> None:
    """Write the state beside the old one, then replace that in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_MODEL + name: value for name, value in codec.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": value for name, value in values.items()}
    unfinished = folder / (_STATE_FILE + ".part")
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        unfinished,
        metadata={"step": str(step), "identity": identity},
    )
    unfinished.replace(folder / _STATE_FILE)


def _restore(
    folder: Path, codec: ImageCodec, optimizer: torch.optim.Optimizer, identity: str
) -> int:
    """Read the state, if there is one; returns how many steps it has seen."""
    file = folder / _STATE_FILE
    if not file.exists():
        return 0
    try:
        with safe_open(file, "pt") as state:
            metadata = state.metadata()
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
    # safetensors reports damage with an exception of its own, derived from Exception alone.
    except Exception as error:
        raise UserError(f"{file}: damaged ({error}); delete it to start anew") from error
    if metadata["identity"] != identity:
        raise UserError(
            f"{file}: left by training with another configuration, seed or set of pictures; "
            "delete it to start anew"
        )
    codec.load_state_dict(_below(tensors, _MODEL))
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for key, value in _below(tensors, _OPTIMIZER).items():
        index, name = key.split(".", 1)
        optimizer_state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    return int(metadata["step"])


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
