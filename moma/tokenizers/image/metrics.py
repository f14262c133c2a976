"""What an image codec achieves: error of its reconstructions, use of its codes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from moma.errors import UserError
from moma.tokenizers.image.batches import stack_images
from moma.tokenizers.image.codec import ImageCodec, in_batches

_MEASURED_IMAGES = 2048
_MEASURED_AT_ONCE = 64
_LARGEST_VALUE = 2.0  # images span [−1, 1]


@dataclass(frozen=True)
class CodecMetrics:
    """What a codec achieves.

    Attributes:
        psnr: peak signal-to-noise ratio of reconstructions, in dB, over all images at once.
        codes_used: share of the codebook that images use.
        perplexity: exp of the entropy of the codes' frequencies.
        images: of how many images `psnr` is.
    """

    psnr: float
    codes_used: float
    perplexity: float
    images: int


def measure_codec(
    codec: ImageCodec,
    images: Sequence[Tensor],
    batch_size: int = _MEASURED_AT_ONCE,
    most: int = _MEASURED_IMAGES,
) -> CodecMetrics:
    """Reconstruct images and report error and use of codes.

    Of more than `most` images no more than that are measured, evenly spread.

    Args:
        codec: the codec, on any device.
        images: as for `train_codec`; best ones that it was not trained on.
        batch_size: images at a time, fewer if they are large.
        most: how many images at most.

    Raises:
        UserError: there are no images.
    """
    if not len(images):
        raise UserError("codec measurement: there are no images")
    chosen = evenly(len(images), most)
    device = codec.codebook.device
    squared, values = 0.0, 0
    counts = torch.zeros(len(codec.codebook), dtype=torch.int64)
    for part in in_batches(len(chosen), min(batch_size, codec.images_at_once)):
        batch_B3HW = stack_images(images, list(chosen[part])).to(device)
        codes_BL = codec.encode(batch_B3HW)
        squared += functional.mse_loss(codec.decode(codes_BL), batch_B3HW, reduction="sum").item()
        values += batch_B3HW.numel()
        counts += codes_BL.flatten().bincount(minlength=len(counts)).cpu()
    shares = counts[counts > 0] / counts.sum()
    return CodecMetrics(
        psnr=signal_to_noise(squared, values),
        codes_used=(counts > 0).double().mean().item(),
        perplexity=shares.log().mul(shares).sum().neg().exp().item(),
        images=len(chosen),
    )


def measure_trained(
    codec: ImageCodec,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor],
    most: int = _MEASURED_IMAGES,
) -> CodecMetrics:
    """The error on held-out images, and the use of codes on those that the codec learned from.

    A few held-out images may not need every code, so they do not tell whether codes lie idle.

    Args:
        codec: the codec, on any device.
        images: what it was trained on.
        held_out: what it has not seen; if there are none, `images` tell the error too.
        most: how many images of each at most, evenly spread.

    Raises:
        UserError: there are no images.
    """
    use = measure_codec(codec, images, most=most)
    if not len(held_out):
        return use
    error = measure_codec(codec, held_out, most=most)
    return replace(use, psnr=error.psnr, images=error.images)


def evenly(count: int, most: int) -> range:
    """At most `most` of `count` indices, evenly spread."""
    return range(0, count, max(1, math.ceil(count / most)))


def signal_to_noise(squared: float, values: int) -> float:
    """Peak signal-to-noise ratio in dB, from the sum of squared errors over `values` in [−1, 1]."""
    return 10 * math.log10(_LARGEST_VALUE**2 * values / max(squared, 1e-12))
