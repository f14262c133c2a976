import math

import pytest
import torch

from moma.errors import UserError
from moma.tokenizers.image.codec import CodecConfig, ImageCodec
from moma.tokenizers.image.metrics import evenly, measure_codec, measure_trained

SHAPE = CodecConfig(
    image_size=16,
    patch=4,
    block_channels=(16,),
    layers_per_block=1,
    latent_channels=8,
    code_channels=8,
    codebook_size=16,
    norm_groups=4,
    middle_attention=False,
    encoder_middle=False,
)


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    return list(torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1)


@pytest.fixture(scope="module")
def codec(images) -> ImageCodec:
    torch.manual_seed(0)
    codec = ImageCodec(SHAPE)
    codec.start_codebook(torch.stack(images))
    return codec.eval()


def test_measures_agree_with_a_direct_computation(codec, images):
    metrics = measure_codec(codec, images, batch_size=7)
    batch_B3HW = torch.stack(images)
    codes_BL = codec.encode(batch_B3HW)
    error = (codec.decode(codes_BL) - batch_B3HW).square().mean().item()
    assert metrics.psnr == pytest.approx(10 * math.log10(4 / error), rel=1e-4)
    shares = [(codes_BL == code).double().mean().item() for code in codes_BL.unique()]
    assert metrics.codes_used == len(shares) / SHAPE.codebook_size
    entropy = -sum(share * math.log(share) for share in shares)
    assert metrics.perplexity == pytest.approx(math.exp(entropy))
    assert metrics.images == len(images)
    assert measure_codec(codec, images, most=8) == measure_codec(codec, images[::4])


def test_the_error_is_told_by_held_out_images_and_the_use_by_the_others(codec, images):
    seen, unseen = images[3:], images[:3]
    both, error, use = (
        measure_trained(codec, seen, unseen),
        measure_codec(codec, unseen),
        measure_codec(codec, seen),
    )
    assert error.codes_used != use.codes_used and error.psnr != use.psnr
    assert (both.psnr, both.images) == (error.psnr, 3)
    assert (both.codes_used, both.perplexity) == (use.codes_used, use.perplexity)
    assert measure_trained(codec, seen, []) == use


def test_indices_are_spread_evenly():
    assert list(evenly(10, 4)) == [0, 3, 6, 9]
    assert list(evenly(3, 4)) == [0, 1, 2]
    assert len(evenly(2049, 2048)) == 1025


def test_no_images_is_an_error(codec, images):
    with pytest.raises(UserError, match="no images"):
        measure_codec(codec, [])
    with pytest.raises(UserError, match="no images"):
        measure_trained(codec, [], images)
