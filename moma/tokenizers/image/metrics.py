"""Quality of an image codec: error of reconstructions, use of codes, sheets of samples."""

import math
from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from moma.errors import UserError
from moma.recipe import Config
from moma.tokenizers.image.codec import ImageCodec, to_pil

_MAX_IMAGES = 2048
_BATCH_SIZE = 64
_RANGE = 2.0  # images are in [−1, 1]
_GAP = 4


class CodecMetrics(Config):
    """Quality of an image codec.

    Attributes:
        psnr: peak signal-to-noise ratio of reconstructions in dB, over all images together.
        codes_used: fraction of the codebook that images use.
        perplexity: exp of the entropy of the codes' frequencies.
        images: number of images that `psnr` was measured on.
    """

    psnr: float
    codes_used: float
    perplexity: float
    images: int


def measure_codec(
    codec: ImageCodec,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor] = (),
    max_images: int = _MAX_IMAGES,
) -> CodecMetrics:
    """Measure the error on held-out images, and the use of codes on training images.

    A few held-out images may not need all codes, so they do not show whether codes are unused.

    Args:
        images: training images, as for `train_codec`.
        held_out: other images; if there are none, the error is measured on `images` too.
        max_images: how many of either are used at most, evenly spaced.

    Raises:
        UserError: there are no images, or what the codec computes is not finite.
    """
    if not len(images):
        raise UserError("codec measurement: there are no images; add a source of images")
    counts_C = torch.zeros(len(codec.codebook), dtype=torch.int64)
    for batch_B3HW in _batches(codec, images, max_images):
        counts_C += codec.encode(batch_B3HW).flatten().bincount(minlength=len(counts_C)).cpu()
    frequencies = counts_C[counts_C > 0] / counts_C.sum()
    measured = held_out if len(held_out) else images
    squared_error, values = 0.0, 0
    for batch_B3HW in _batches(codec, measured, max_images):
        reconstructions_B3HW = codec.decode(codec.encode(batch_B3HW))
        squared_error += functional.mse_loss(
            reconstructions_B3HW, batch_B3HW, reduction="sum"
        ).item()
        values += batch_B3HW.numel()
    if not math.isfinite(squared_error):
        raise UserError(
            "codec: its output is not finite: its training has diverged; delete the folder "
            "codec_training and lower codec_training.learning_rate or the weights of the losses"
        )
    return CodecMetrics(
        psnr=signal_to_noise(squared_error, values),
        codes_used=(counts_C > 0).double().mean().item(),
        perplexity=frequencies.log().mul(frequencies).sum().neg().exp().item(),
        images=len(evenly_spaced(len(measured), max_images)),
    )


def evenly_spaced(count: int, limit: int) -> range:
    """At most `limit` of `count` indices, evenly spaced."""
    return range(0, count, max(1, math.ceil(count / limit)))


def signal_to_noise(squared_error: float, values: int) -> float:
    """Peak signal-to-noise ratio in dB, from the sum of squared errors of values in [−1, 1]."""
    return 10 * math.log10(_RANGE**2 * values / max(squared_error, 1e-12))


def stack_images(images: Sequence[Tensor], indices: Sequence[int]) -> Tensor:
    """Some images as one float tensor [B, 3, H, W] in [−1, 1]."""
    batch_B3HW = torch.stack([images[index] for index in indices])
    if batch_B3HW.dtype == torch.uint8:
        return batch_B3HW.float() / 255 * 2 - 1
    return batch_B3HW


def sample_sheet(codec: ImageCodec, images: Sequence[Tensor], limit: int = 8) -> Image.Image:
    """Up to `limit` images above their reconstructions."""
    originals_B3HW = stack_images(images, evenly_spaced(len(images), limit))
    batches = originals_B3HW.to(codec.codebook.device).split(codec.images_at_once)
    reconstructions_B3HW = torch.cat([codec.decode(codec.encode(batch)) for batch in batches])
    return image_grid(
        [[to_pil(each) for each in originals_B3HW], [to_pil(each) for each in reconstructions_B3HW]]
    )


def image_grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of images of one size, on white."""
    width, height = rows[0][0].size
    columns = max(map(len, rows))
    size = (columns * (width + _GAP) + _GAP, len(rows) * (height + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            sheet.paste(image, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
    return sheet


def _batches(codec: ImageCodec, images: Sequence[Tensor], limit: int) -> Iterator[Tensor]:
    indices = evenly_spaced(len(images), limit)
    size = min(_BATCH_SIZE, codec.images_at_once)
    for start in range(0, len(indices), size):
        yield stack_images(images, indices[start : start + size]).to(codec.codebook.device)
