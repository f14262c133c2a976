import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from moma.errors import UserError
from moma.recipe import check
from moma.tokenizers.image import codec as image
from moma.tokenizers.image.codec import CODEC_FILES, CodecConfig, ImageCodec, preprocess, to_pil

SMALL = CodecConfig(
    image_size=16,
    patch=2,
    block_channels=(8, 16),
    layers_per_block=1,
    latent_channels=8,
    code_channels=8,
    codebook_size=32,
    norm_groups=4,
    middle_attention=False,
)


@pytest.fixture
def codec() -> ImageCodec:
    torch.manual_seed(0)
    return ImageCodec(SMALL).eval()


@pytest.fixture(name="images_B3HW")
def random_images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_default_has_chameleons_shape():
    with torch.device("meta"):
        codec = ImageCodec(CodecConfig())
    learned = sum(weight.numel() for weight in codec.parameters())
    assert learned + codec.codebook.numel() == 68_718_467
    assert tuple(codec.codebook.shape) == (8192, 256)
    assert codec.codes_per_image == 1024


def test_codes_are_row_major_and_name_the_nearest_vector(codec, images_B3HW):
    codes_BL = codec.encode(images_B3HW)
    assert codes_BL.dtype == torch.int64
    assert codes_BL.shape == (3, codec.codes_per_image) == (3, 16)
    latents_BDhw = codec.latents(images_B3HW)
    for row, column in ((0, 1), (1, 0), (3, 2)):
        distances = (codec.codebook - latents_BDhw[2, :, row, column]).square().sum(1)
        assert codes_BL[2, row * 4 + column] == distances.argmin()


def test_without_context_a_code_depends_on_its_own_square_alone(images_B3HW):
    alone = {"patch": 4, "block_channels": (16,), "encoder_context": False}
    codec = ImageCodec(SMALL.model_copy(update=alone)).eval()
    before_BDhw = codec.latents(images_B3HW)
    images_B3HW[:, :, 4:8, 8:12] *= -1  # the square in row 1, column 2
    changed_Bhw = (codec.latents(images_B3HW) != before_BDhw).any(dim=1)
    expected_hw = torch.zeros(4, 4, dtype=torch.bool)
    expected_hw[1, 2] = True
    assert torch.equal(changed_Bhw, expected_hw.expand(3, 4, 4))
    with pytest.raises(UserError, match="encoder_context = false needs a single width"):
        check(CodecConfig, SMALL.model_dump() | {"encoder_context": False}, "recipe")


def test_encoding_changes_nothing_and_does_not_depend_on_the_batch(codec, images_B3HW):
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    together = codec.encode(images_B3HW)
    alone = torch.cat([codec.encode(image[None]) for image in images_B3HW])
    assert torch.equal(together, alone)
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())


def test_a_processor_encodes_in_small_parts(codec, images_B3HW, monkeypatch):
    """Two images, folded to 8 × 8 and 8 channels wide, then one; distances of three vectors."""
    expected, seen = codec.encode(images_B3HW), []
    monkeypatch.setattr(image, "_NUMBERS_AT_ONCE_ON_CPU", 2 * 8 * 8 * 8)
    monkeypatch.setattr(image, "_DISTANCES_AT_ONCE_ON_CPU", 3 * SMALL.codebook_size)
    codec.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    compared, addmm = [], torch.addmm

    def record(norms_C, vectors_ND, *others, **options):
        compared.append(len(vectors_ND))
        return addmm(norms_C, vectors_ND, *others, **options)

    monkeypatch.setattr(image.torch, "addmm", record)
    assert torch.equal(codec.encode(images_B3HW), expected)
    assert seen == [2, 1]
    assert compared == [3] * 16
    assert image._at_once(SMALL, images_B3HW.to("meta"))[0] == 3


def test_decoding_draws_in_range_and_follows_the_quantizer(codec, images_B3HW):
    codes_BL = codec.encode(images_B3HW)
    reconstructions_B3HW = codec.decode(codes_BL)
    assert reconstructions_B3HW.shape == images_B3HW.shape
    assert reconstructions_B3HW.abs().max() <= 1
    vectors_BDhw = codec.codebook[codes_BL].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(reconstructions_B3HW, codec.images(vectors_BDhw).clamp(-1, 1))


def test_training_passes_agree_with_encode_and_decode(codec, images_B3HW):
    codec.start_codebook(images_B3HW)
    codec.eval()
    with torch.no_grad():
        reconstructions_B3HW, _ = codec(images_B3HW)
    expected = codec.decode(codec.encode(images_B3HW))
    torch.testing.assert_close(reconstructions_B3HW.clamp(-1, 1), expected)


def test_starting_the_codebook_spreads_it_over_the_latents(codec, images_B3HW):
    codec.start_codebook(images_B3HW)
    used = codec.encode(images_B3HW).unique().numel()
    assert used > 0.8 * SMALL.codebook_size


def codec_in_training(images_B3HW, **changes):
    torch.manual_seed(0)
    codec = ImageCodec(SMALL.model_copy(update=changes))
    codec.start_codebook(images_B3HW)
    return codec


def latents_of(codec, images_B3HW):
    """What the encoder sees: a vector of each square of each image."""
    return codec.latents(images_B3HW).detach().permute(0, 2, 3, 1).flatten(0, 2)


def test_a_codebook_vector_is_the_moving_average_of_what_chose_it(images_B3HW):
    """Van den Oord et al. 2017, appendix A.1, one vector after the other."""
    codec = codec_in_training(images_B3HW, codebook_decay=0.9, dead_code_threshold=0)
    images_B3HW = -images_B3HW  # other ones: k-means left the codebook at rest
    book, epsilon = codec.quantizer._codebook, 1e-5
    counts_C, sums_CD = book.cluster_size[0].clone(), book.embed_avg[0].clone()
    before_CD = codec.codebook.clone()
    latents_ND = latents_of(codec, images_B3HW)
    chosen_N = torch.stack([(before_CD - x_D).square().sum(1).argmin() for x_D in latents_ND])
    for code in range(len(before_CD)):
        its_ND = latents_ND[chosen_N == code]
        counts_C[code] = 0.9 * counts_C[code] + 0.1 * len(its_ND)
        sums_CD[code] = 0.9 * sums_CD[code] + 0.1 * its_ND.sum(0)
    total = counts_C.sum()
    smoothed_C = (counts_C + epsilon) / (total + len(counts_C) * epsilon) * total
    codec(images_B3HW)
    torch.testing.assert_close(codec.codebook, sums_CD / smoothed_C[:, None])
    assert not torch.equal(codec.codebook, before_CD)


@pytest.mark.parametrize("threshold", [0.05, 0])
def test_vectors_that_nothing_chooses_move_to_what_the_encoder_sees(images_B3HW, threshold):
    codec = codec_in_training(images_B3HW, dead_code_threshold=threshold)
    book = codec.quantizer._codebook
    book.embed[0, :4], book.cluster_size[0, :4], book.embed_avg[0, :4] = 100, 0.01, 1
    latents_ND = latents_of(codec, images_B3HW)
    codec(images_B3HW)
    far = codec.codebook.abs().amax(1) > 50
    if not threshold:
        assert far.nonzero().flatten().tolist() == [0, 1, 2, 3]
        return
    assert not far.any()
    for vector_D in codec.codebook[:4]:
        assert (latents_ND - vector_D).abs().amax(1).min() < 1e-6
    # Each is at home in another place, and is chosen there at once.
    assert {0, 1, 2, 3} <= set(codec.eval().encode(images_B3HW).flatten().tolist())


def test_a_saved_codec_gives_the_same_codes(codec, images_B3HW, tmp_path):
    codec.save(tmp_path / "codec")
    loaded = ImageCodec.load(tmp_path / "codec")
    assert loaded.config == SMALL
    assert not loaded.training
    codes_BL = codec.encode(images_B3HW)
    assert torch.equal(loaded.encode(images_B3HW), codes_BL)
    assert torch.equal(loaded.decode(codes_BL), codec.decode(codes_BL))


def test_a_folder_that_holds_no_codec_is_an_error(codec, tmp_path):
    with pytest.raises(UserError, match="not an image codec"):
        ImageCodec.load(tmp_path)
    codec.save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"codebook_size": 64}))
    with pytest.raises(UserError, match="differ"):
        ImageCodec.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"colour": 1}))
    with pytest.raises(UserError, match="unknown key 'colour'"):
        ImageCodec.load(tmp_path)
    codec.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="not an image codec"):
        ImageCodec.load(tmp_path)


def test_wrong_shapes_and_codes_are_errors(codec, images_B3HW):
    with pytest.raises(UserError, match="this codec takes"):
        codec.encode(images_B3HW[..., :8])
    with pytest.raises(UserError, match="16 needed"):
        codec.decode(torch.zeros(1, 15, dtype=torch.int64))
    with pytest.raises(UserError, match="outside of 0 … 31"):
        codec.decode(torch.full((1, 16), 32))


def test_a_shape_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="no multiple of 8"):
        check(CodecConfig, {"image_size": 20, "patch": 8, "block_channels": [32]}, "recipe")
    with pytest.raises(UserError, match="block_channels"):
        check(CodecConfig, {"block_channels": [0]}, "recipe")
    with pytest.raises(UserError, match="norm_groups"):
        check(CodecConfig, {"block_channels": [48], "norm_groups": 32}, "recipe")


def test_without_its_middle_the_encoder_is_smaller():
    small, smaller = (
        sum(weight.numel() for weight in ImageCodec(config).encoder.parameters())
        for config in (SMALL, SMALL.model_copy(update={"encoder_middle": False}))
    )
    assert smaller < small


def test_preprocessing_blends_resizes_and_crops_the_centre():
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 2))
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    levels = preprocess(image, 20)
    assert levels.shape == (3, 20, 20)
    assert levels[:, 0, 10].tolist() == [1, 1, 1]
    assert levels[:, 10, 10].tolist() == [1, -1, -1]
    assert levels[2, 2:].max() == -1  # the blue border lay outside of the centre
    assert preprocess(Image.new("L", (3, 7), 255), 16).shape == (3, 16, 16)


def test_a_transparent_colour_becomes_white():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert preprocess(red, 4)[:, 0, 0].tolist() == [1, -1, -1]
    red.info["transparency"] = (255, 0, 0)  # as PNG files of three channels have it
    assert preprocess(red, 4)[:, 0, 0].tolist() == [1, 1, 1]


def test_preprocessing_uses_the_exact_scale_and_to_pil_undoes_it():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values] * 3, -1))
    levels = preprocess(image, 16)
    torch.testing.assert_close(levels[0].flatten(), torch.arange(256) / 255 * 2 - 1)
    assert to_pil(levels).tobytes() == image.tobytes()
    assert to_pil(levels * 3).getextrema()[0] == (0, 255)


def test_a_codec_that_cannot_be_written_names_the_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"cannot write it .*model\.safetensors"):
        ImageCodec(SMALL).save(tmp_path)


def test_another_configuration_than_the_weights_is_told_in_a_line(tmp_path):
    ImageCodec(SMALL).save(tmp_path)
    (tmp_path / "config.json").write_text(CodecConfig(decoder=False).model_dump_json())
    with pytest.raises(UserError, match=r"weights and config\.json differ") as caught:
        ImageCodec.load(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_stray_file_in_the_codec_folder_is_not_part_of_the_codec(tmp_path):
    codec = ImageCodec(SMALL)
    codec.save(tmp_path)
    save_file({"quant_conv.bias": torch.zeros(8)}, tmp_path / "a_stray.safetensors")
    assert sorted(CODEC_FILES) == ["config.json", "model.safetensors"]
    assert torch.equal(ImageCodec.load(tmp_path).codebook, codec.codebook)
