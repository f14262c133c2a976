"""The image codec: codes and images, the codebook's training, its files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from moma.errors import UserError
from moma.recipe import check
from moma.tokenizers.image import codec as image
from moma.tokenizers.image.codec import CODEC_FILES, CodecConfig, ImageCodec, preprocess, to_pil
from tests.factories import codec_config, make_codec, random_images

SMALL = codec_config(
    patch=2, block_channels=[8, 16], codebook_size=32, encoder_middle=True, norm_groups=4
)


@pytest.fixture
def codec() -> ImageCodec:
    return make_codec(**SMALL.model_dump())


@pytest.fixture(name="images_B3HW")
def three_images() -> torch.Tensor:
    return random_images(3)


def book(codec: ImageCodec, name: str) -> torch.Tensor:
    """A tensor of the codebook's training state; changes take effect in the codec."""
    return codec.state_dict()[f"quantizer._codebook.{name}"]


def test_the_default_has_chameleons_shape():
    with torch.device("meta"):
        codec = ImageCodec(CodecConfig())
    learned = sum(weight.numel() for weight in codec.parameters())
    assert learned + codec.codebook.numel() == 68_718_467
    assert tuple(codec.codebook.shape) == (8192, 256)
    assert codec.codes_per_image == 1024


def test_codes_are_row_major_indices_of_the_nearest_vectors(codec, images_B3HW):
    codes_BL = codec.encode(images_B3HW)
    assert codes_BL.dtype == torch.int64
    assert codes_BL.shape == (3, codec.codes_per_image) == (3, 16)
    latents_BDhw = codec.latents(images_B3HW)
    for row, column in ((0, 1), (1, 0), (3, 2)):
        distances = (codec.codebook - latents_BDhw[2, :, row, column]).square().sum(1)
        assert codes_BL[2, row * 4 + column] == distances.argmin()


def test_without_context_a_code_depends_only_on_its_own_square(images_B3HW):
    changes = {"patch": 4, "block_channels": (16,), "encoder_context": False}
    codec = make_codec(**SMALL.model_dump() | changes)
    before_BDhw = codec.latents(images_B3HW)
    images_B3HW[:, :, 4:8, 8:12] *= -1  # the square in row 1, column 2
    changed_Bhw = (codec.latents(images_B3HW) != before_BDhw).any(dim=1)
    expected_hw = torch.zeros(4, 4, dtype=torch.bool)
    expected_hw[1, 2] = True
    assert torch.equal(changed_Bhw, expected_hw.expand(3, 4, 4))
    with pytest.raises(UserError, match="encoder_context = false needs a single block"):
        check(CodecConfig, SMALL.model_dump() | {"encoder_context": False}, "recipe")


def test_encoding_changes_nothing_and_does_not_depend_on_the_batch(codec, images_B3HW):
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    together = codec.encode(images_B3HW)
    one_by_one = torch.cat([codec.encode(image[None]) for image in images_B3HW])
    assert torch.equal(together, one_by_one)
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())


def test_a_cpu_encodes_in_small_parts(codec, images_B3HW, monkeypatch):
    """Two images, folded to 8 × 8 and 8 channels, then one; distances of three vectors."""
    expected, seen = codec.encode(images_B3HW), []
    monkeypatch.setattr(image, "MAX_CPU_ACTIVATIONS", 2 * 8 * 8 * 8)
    monkeypatch.setattr(image, "MAX_CPU_DISTANCES", 3 * SMALL.codebook_size)
    codec.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    compared, addmm = [], torch.addmm

    def record(norms_C, vectors_ND, *others, **options):
        compared.append(len(vectors_ND))
        return addmm(norms_C, vectors_ND, *others, **options)

    monkeypatch.setattr(image.torch, "addmm", record)
    assert torch.equal(codec.encode(images_B3HW), expected)
    assert seen == [2, 1]
    assert compared == [3] * 16
    seen.clear()
    codec.to("meta").encode(images_B3HW.to("meta"))
    assert seen == [3]


def test_decoding_is_in_range_and_uses_the_codebook(codec, images_B3HW):
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


def test_the_codebook_starts_spread_over_the_latents(codec, images_B3HW):
    codec.start_codebook(images_B3HW)
    used = codec.encode(images_B3HW).unique().numel()
    assert used > 0.8 * SMALL.codebook_size


def codec_in_training(images_B3HW, **changes):
    torch.manual_seed(0)
    codec = ImageCodec(SMALL.model_copy(update=changes))
    codec.start_codebook(images_B3HW)
    return codec


def latents_of(codec, images_B3HW):
    """The encoder's output: a vector for each square of each image."""
    return codec.latents(images_B3HW).detach().permute(0, 2, 3, 1).flatten(0, 2)


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_a_codebook_vector_is_the_moving_average_of_its_latents(images_B3HW, decay):
    """Van den Oord et al. 2017, appendix A.1, one vector after the other."""
    codec = codec_in_training(images_B3HW, codebook_decay=decay, dead_code_threshold=0)
    images_B3HW = -images_B3HW  # others: k-means left the codebook in equilibrium
    counts_C, sums_CD = (book(codec, name)[0].clone() for name in ("cluster_size", "embed_avg"))
    before_CD, epsilon = codec.codebook.clone(), 1e-5
    latents_ND = latents_of(codec, images_B3HW)
    chosen_N = torch.stack([(before_CD - x_D).square().sum(1).argmin() for x_D in latents_ND])
    for code in range(len(before_CD)):
        its_ND = latents_ND[chosen_N == code]
        counts_C[code] = decay * counts_C[code] + (1 - decay) * len(its_ND)
        sums_CD[code] = decay * sums_CD[code] + (1 - decay) * its_ND.sum(0)
    total = counts_C.sum()
    smoothed_C = (counts_C + epsilon) / (total + len(counts_C) * epsilon) * total
    codec(images_B3HW)
    torch.testing.assert_close(codec.codebook, sums_CD / smoothed_C[:, None])
    assert not torch.equal(codec.codebook, before_CD)


@pytest.mark.parametrize("threshold", [0.05, 0])
def test_unused_vectors_move_to_latents(images_B3HW, threshold):
    codec = codec_in_training(images_B3HW, dead_code_threshold=threshold)
    for name, value in {"embed": 100, "cluster_size": 0.01, "embed_avg": 1}.items():
        book(codec, name)[0, :4] = value
    latents_ND = latents_of(codec, images_B3HW)
    codec(images_B3HW)
    far = codec.codebook.abs().amax(1) > 50
    if not threshold:
        assert far.nonzero().flatten().tolist() == [0, 1, 2, 3]
        return
    assert not far.any()
    for vector_D in codec.codebook[:4]:
        assert (latents_ND - vector_D).abs().amax(1).min() < 1e-6
    # Each is at another latent, and is chosen there at once.
    assert {0, 1, 2, 3} <= set(codec.eval().encode(images_B3HW).flatten().tolist())


def test_the_commitment_loss_has_its_weight(images_B3HW):
    """The squared distance from latents to their vectors (van den Oord et al. 2017, Eq. 3)."""
    for weight in (0.25, 1.0):
        codec = codec_in_training(images_B3HW, commitment_weight=weight, dead_code_threshold=0)
        latents_ND = latents_of(codec, images_B3HW)
        nearest_ND = codec.codebook[torch.cdist(latents_ND, codec.codebook).argmin(1)].clone()
        _, commitment = codec(images_B3HW)
        expected = weight * functional.mse_loss(latents_ND, nearest_ND)
        torch.testing.assert_close(commitment, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "name", "shape"),
    [
        ({"patch": 4}, "encoder.conv_in.weight", (8, 48, 3, 3)),
        ({"block_channels": [4, 8]}, "encoder.conv_in.weight", (4, 12, 3, 3)),
        ({"layers_per_block": 2}, "encoder.down_blocks.0.resnets.1.conv1.bias", (8,)),
        ({"layers_per_block": 2}, "decoder.up_blocks.0.resnets.2.conv1.bias", (16,)),
        ({"latent_channels": 6}, "quant_conv.weight", (8, 6, 1, 1)),
        ({"code_channels": 6}, "quant_conv.weight", (6, 8, 1, 1)),
        ({"codebook_size": 40}, "quantizer._codebook.embed", (1, 40, 8)),
        ({"encoder_middle": False}, "encoder.mid_block.resnets.0.conv1.weight", None),
        ({"middle_attention": True}, "decoder.mid_block.attentions.0.to_q.bias", (16,)),
        ({"decoder": False}, "decoder.conv_in.weight", None),
        ({"patch": 4, "block_channels": [8], "encoder_context": False}, "encoder.4.bias", (8,)),
    ],
)
def test_every_key_of_the_shape_determines_weights(changes, name, shape):
    with torch.device("meta"):
        before = ImageCodec(SMALL).state_dict()
        after = ImageCodec(check(CodecConfig, SMALL.model_dump() | changes, "codec")).state_dict()
    found = [tuple(each[name].shape) if name in each else None for each in (before, after)]
    assert found[1] == shape != found[0]


def test_norm_groups_and_image_size_are_used(images_B3HW):
    four, two = (
        make_codec(**SMALL.model_dump() | {"norm_groups": groups}).latents(images_B3HW)
        for groups in (4, 2)
    )
    assert not torch.allclose(four, two)
    larger = make_codec(**SMALL.model_dump() | {"image_size": 32})
    assert larger.codes_per_image == 64
    assert larger.encode(random_images(1, size=32)).shape == (1, 64)


def test_a_saved_codec_gives_the_same_codes(codec, images_B3HW, tmp_path):
    codec.save(tmp_path / "codec")
    # Whoever can read one file can read all.
    assert len({file.stat().st_mode for file in (tmp_path / "codec").iterdir()}) == 1
    loaded = ImageCodec.load(tmp_path / "codec")
    assert loaded.config == SMALL
    assert not loaded.training
    codes_BL = codec.encode(images_B3HW)
    assert torch.equal(loaded.encode(images_B3HW), codes_BL)
    assert torch.equal(loaded.decode(codes_BL), codec.decode(codes_BL))


def write_config(folder, codec, **changes):
    values = codec.config.model_dump(mode="json") | changes
    (folder / "config.json").write_text(json.dumps(values))


def test_a_folder_without_a_codec_is_refused(codec, tmp_path):
    with pytest.raises(UserError, match="not an image codec"):
        ImageCodec.load(tmp_path)
    codec.save(tmp_path)
    write_config(tmp_path, codec, color=1)
    with pytest.raises(UserError, match="unknown key 'color'"):
        ImageCodec.load(tmp_path)
    for content in ("{", "[]", "[" * 100_000, '{"patch": 2, "patch": 2}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json: "):
            ImageCodec.load(tmp_path)
    codec.save(tmp_path)
    for torn in (b"torn", b"", b"\xff" * 8 + b"{}"):
        (tmp_path / "model.safetensors").write_bytes(torn)
        with pytest.raises(UserError, match=r"model\.safetensors: cannot read"):
            ImageCodec.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 64}, r"cluster_size has shape \(1, 32\) instead of \(1, 64\)"),
        ({"codebook_size": 2**20, "code_channels": 2**14}, "has shape"),
        ({"block_channels": [2**14, 2**14]}, "0 missing: none; 4 unknown"),
        ({"codebook_size": 2**40}, "less than or equal to 1048576"),
        ({"block_channels": [2**30] * 2}, r"block_channels.*less than or equal"),
        ({"layers_per_block": 10**9}, r"layers_per_block.*less than or equal"),
        ({"image_size": 2**40}, r"image_size.*less than or equal"),
        ({"latent_channels": 2**40}, r"latent_channels.*less than or equal"),
        ({"block_channels": [8] * 60}, "image_size 16 is no multiple"),
        ({"layers_per_block": 64}, r"\d+ missing: decoder.*0 unknown"),
        ({"decoder": False}, r"0 missing: none; \d+ unknown: decoder"),
    ],
)
def test_a_configuration_that_does_not_match_the_weights_is_refused_before_they_are_read(
    codec, tmp_path, changes, message
):
    codec.save(tmp_path)
    write_config(tmp_path, codec, **changes)
    with pytest.raises(UserError, match=message) as caught:
        ImageCodec.load(tmp_path)
    assert "config.json" in str(caught.value)
    assert len(str(caught.value)) < 500 + 2 * len(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights["quant_conv.bias"].fill_(torch.nan), "quant_conv.bias has NaN"),
        (
            lambda weights: weights.update({"quant_conv.bias": torch.zeros(8, dtype=torch.int32)}),
            r"quant_conv\.bias is torch\.int32",
        ),
    ],
)
def test_weights_with_wrong_values_are_refused(codec, tmp_path, change, message):
    codec.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        ImageCodec.load(tmp_path)


def test_wrong_shapes_and_codes_are_errors(codec, images_B3HW):
    with pytest.raises(UserError, match="this codec takes"):
        codec.encode(images_B3HW[..., :8])
    with pytest.raises(UserError, match="an image has 16"):
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


def test_preprocessing_blends_resizes_and_crops_the_center():
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 2))
    image.paste((0, 0, 255, 255), (0, 0, 10, 20))
    levels = preprocess(image, 20)
    assert levels.shape == (3, 20, 20)
    assert levels[:, 0, 10].tolist() == [1, 1, 1]
    assert levels[:, 10, 10].tolist() == [1, -1, -1]
    assert levels[2, 2:].max() == -1  # the blue border lay outside of the center
    assert preprocess(Image.new("L", (3, 7), 255), 16).shape == (3, 16, 16)


def test_a_transparent_color_becomes_white():
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
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors"):
        ImageCodec(SMALL).save(tmp_path)


def test_a_stray_file_in_the_codec_folder_is_not_part_of_the_codec(codec, tmp_path):
    codec.save(tmp_path)
    save_file({"quant_conv.bias": torch.zeros(8)}, tmp_path / "a_stray.safetensors")
    assert sorted(CODEC_FILES) == ["config.json", "model.safetensors"]
    assert torch.equal(ImageCodec.load(tmp_path).codebook, codec.codebook)


def test_large_images_are_processed_a_few_at_a_time(monkeypatch):
    with torch.device("meta"):
        assert ImageCodec(CodecConfig()).images_at_once == 16
    images_B3HW, codecs = random_images(10), []
    for pixels in (2**22, 4 * 16 * 16):
        monkeypatch.setattr(image, "MAX_PIXELS", pixels)
        torch.manual_seed(0)
        codec = ImageCodec(SMALL)
        codec.start_codebook(images_B3HW)
        codecs.append(codec.codebook)
    torch.testing.assert_close(*codecs)
