"""Quality of a codec, against direct computations, and sheets of samples."""

import copy
import math

import pytest
import torch

from moma.errors import UserError
from moma.tokenizers.image.codec import ImageCodec, to_pil
from moma.tokenizers.image.metrics import (
    evenly_spaced,
    measure_codec,
    sample_sheet,
)
from tests.factories import make_codec, random_images

IMAGES = list(random_images(70))  # more than one batch


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    codec = make_codec()
    codec.start_codebook(torch.stack(IMAGES))
    return codec.eval()


def test_metrics_agree_with_a_direct_computation(codec):
    metrics = measure_codec(codec, IMAGES)
    batch_B3HW = torch.stack(IMAGES)
    codes_BL = codec.encode(batch_B3HW)
    error = (codec.decode(codes_BL) - batch_B3HW).square().mean().item()
    assert metrics.psnr == pytest.approx(10 * math.log10(4 / error), rel=1e-4)
    shares = [(codes_BL == code).double().mean().item() for code in codes_BL.unique()]
    assert metrics.codes_used == len(shares) / codec.config.codebook_size
    entropy = -sum(share * math.log(share) for share in shares)
    assert metrics.perplexity == pytest.approx(math.exp(entropy))
    assert metrics.images == len(IMAGES)
    assert measure_codec(codec, IMAGES, max_images=8) == measure_codec(codec, IMAGES[::9])


def test_the_error_is_measured_on_held_out_images_and_the_codes_on_the_others(codec):
    seen, unseen = IMAGES[3:], IMAGES[:3]
    both, error, use = (
        measure_codec(codec, seen, unseen),
        measure_codec(codec, unseen),
        measure_codec(codec, seen),
    )
    assert error.perplexity != use.perplexity and error.psnr != use.psnr
    assert (both.psnr, both.images) == (error.psnr, 3)
    assert (both.codes_used, both.perplexity) == (use.codes_used, use.perplexity)


def test_indices_are_evenly_spaced():
    assert list(evenly_spaced(10, 4)) == [0, 3, 6, 9]
    assert list(evenly_spaced(3, 4)) == [0, 1, 2]
    assert len(evenly_spaced(2049, 2048)) == 1025


def test_a_diverged_codec_is_an_error(codec):
    diverged = copy.deepcopy(codec)
    torch.nn.init.constant_(diverged.last_layer, math.nan)
    with pytest.raises(UserError, match=r"not finite.*lower codec_training\.learning_rate"):
        measure_codec(diverged, IMAGES)


def test_no_images_are_an_error(codec):
    with pytest.raises(UserError, match="no images"):
        measure_codec(codec, [], IMAGES)


def test_a_sample_sheet_has_originals_above_reconstructions(codec):
    sheet = sample_sheet(codec, IMAGES[:10], limit=8)
    assert sheet.size == (5 * 20 + 4, 2 * 20 + 4)  # every second of ten images
    assert sheet.crop((24, 4, 40, 20)).tobytes() == to_pil(IMAGES[2]).tobytes()
    reconstructions_B3HW = codec.decode(codec.encode(torch.stack(IMAGES[2:3])))
    assert sheet.crop((24, 24, 40, 40)).tobytes() == to_pil(reconstructions_B3HW[0]).tobytes()


def test_a_sample_sheet_decodes_a_few_images_at_once(codec, monkeypatch):
    expected = sample_sheet(codec, IMAGES, 8)
    monkeypatch.setattr("moma.tokenizers.image.codec.MAX_PIXELS", 3 * 16 * 16)
    assert codec.images_at_once == 3
    difference = torch.tensor(list(sample_sheet(codec, IMAGES, 8).tobytes())) - torch.tensor(
        list(expected.tobytes())
    )
    assert difference.abs().max() <= 1
