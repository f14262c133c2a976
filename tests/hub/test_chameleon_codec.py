"""Chameleon's image weights, compared with `transformers`' port with random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from moma.errors import UserError
from moma.hub.chameleon_codec import (
    from_original_layout,
    load_chameleon_codec,
    original_layout,
)
from moma.recipe import check
from moma.tokenizers.image.codec import CodecConfig, ImageCodec
from tests.factories import make_codec, random_images

SIZE = 32
SHAPE = CodecConfig(
    image_size=SIZE,
    block_channels=(32, 32, 64),
    latent_channels=32,
    code_channels=16,
    codebook_size=64,
)


def random_port(**config):
    """The port with random weights, norms and biases too, and a codebook among its latents."""
    pytest.importorskip("transformers")
    from transformers import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    model = ChameleonVQVAE(ChameleonVQVAEConfig(**config)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=draw) / weight[0].numel() ** 0.5)
            if "norm" in name:
                weight.mul_(0.2).add_(name.endswith("weight"))
        size = model.config.resolution
        seen = torch.rand(8, 3, size, size, generator=draw) * 2 - 1
        latents_ND = model.quant_conv(model.encoder(seen)).transpose(0, 1).flatten(1).T
        chosen = torch.randint(len(latents_ND), (model.config.num_embeddings,), generator=draw)
        model.quantize.embedding.weight.copy_(latents_ND[chosen])
    return model


@pytest.fixture(scope="module")
def port():
    return random_port(
        embed_dim=16,
        num_embeddings=64,
        latent_channels=32,
        resolution=SIZE,
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        num_res_blocks=2,
    )


@pytest.fixture(scope="module")
def images_B3HW():
    return random_images(4, SIZE)


@pytest.fixture
def codec():
    return make_codec(seed=2, **SHAPE.model_dump())


def test_the_ports_weights_give_the_ports_codes(port, images_B3HW):
    codec = from_original_layout(port.state_dict(), SIZE)
    codes_BL = codec.encode(images_B3HW)
    with torch.no_grad():
        expected = port.encode(images_B3HW).image_tokens.view(4, -1)
    assert torch.equal(codes_BL, expected)
    assert codes_BL.unique().numel() > 10
    assert codec.config == SHAPE.model_copy(update={"decoder": False})


@pytest.mark.slow
def test_the_ports_codes_at_full_size():
    port = random_port()
    codec = from_original_layout(port.state_dict(), 512)
    image_B3HW = random_images(1, 512)
    with torch.no_grad():
        expected = port.encode(image_B3HW).image_tokens.view(1, -1)
    assert torch.equal(codec.encode(image_B3HW), expected)
    assert codec.config == CodecConfig(decoder=False)
    assert expected.unique().numel() > 100


def test_all_weights_of_the_port_are_exported(port):
    codec = from_original_layout(port.state_dict(), SIZE)
    again = original_layout(codec)
    theirs = port.state_dict()
    assert again.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(again[name], value), name


def test_a_folder_of_the_port_is_read_with_its_resolution(port, images_B3HW, tmp_path):
    """In two files of a language model; its other weights are ignored."""
    weights = {f"model.vqmodel.{name}": value for name, value in port.state_dict().items()}
    names = sorted(weights)
    save_file({n: weights[n] for n in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {n: weights[n] for n in names[1::2]} | {"model.embed_tokens.weight": torch.zeros(3)}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vq_config": {"resolution": SIZE}}))
    codec = load_chameleon_codec(tmp_path)
    assert codec.config.image_size == SIZE
    expected = from_original_layout(port.state_dict(), SIZE).encode(images_B3HW)
    assert torch.equal(codec.encode(images_B3HW), expected)


def test_a_saved_codec_without_a_decoder_refuses_to_decode(port, images_B3HW, tmp_path):
    from_original_layout(port.state_dict(), SIZE).save(tmp_path)
    codec = ImageCodec.load(tmp_path)
    codes_BL = codec.encode(images_B3HW)
    with pytest.raises(UserError, match="no decoder"):
        codec.decode(codes_BL)


def original_names(multipliers: tuple[int, ...], layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original release, from its structure."""
    shapes: dict[str, tuple[int, ...]] = {}
    widths = [32 * m for m in multipliers]

    def convolution(name, before, after, side):
        shapes[f"{name}.weight"] = (after, before, side, side)
        shapes[f"{name}.bias"] = (after,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def residual(name, before, after):
        norm(f"{name}.norm1", before)
        convolution(f"{name}.conv1", before, after, 3)
        norm(f"{name}.norm2", after)
        convolution(f"{name}.conv2", after, after, 3)
        if before != after:
            convolution(f"{name}.nin_shortcut", before, after, 1)

    def middle(name, width):
        residual(f"{name}.mid.block_1", width, width)
        norm(f"{name}.mid.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            convolution(f"{name}.mid.attn_1.{part}", width, width, 1)
        residual(f"{name}.mid.block_2", width, width)

    convolution("encoder.conv_in", 3, 32, 3)
    before = 32
    for block, width in enumerate(widths):
        for layer in range(layers):
            residual(f"encoder.down.{block}.block.{layer}", before, width)
            before = width
        if block < len(widths) - 1:
            convolution(f"encoder.down.{block}.downsample.conv", width, width, 3)
    middle("encoder", before)
    norm("encoder.norm_out", before)
    convolution("encoder.conv_out", before, 32, 3)
    convolution("quant_conv", 32, 16, 1)
    shapes["quantize.embedding.weight"] = (64, 16)
    convolution("post_quant_conv", 16, 32, 1)
    convolution("decoder.conv_in", 32, before, 3)
    middle("decoder", before)
    for block, width in reversed(list(enumerate(widths))):
        for layer in range(layers + 1):
            residual(f"decoder.up.{block}.block.{layer}", before, width)
            before = width
        if block > 0:
            convolution(f"decoder.up.{block}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", before)
    convolution("decoder.conv_out", before, 3, 3)
    return shapes


def test_the_original_layout_has_its_names_and_shapes(codec):
    layout = original_layout(codec)
    shapes = {name: tuple(value.shape) for name, value in layout.items()}
    assert shapes == original_names((1, 1, 2), 2)


def test_the_default_shape_is_that_of_the_original():
    with torch.device("meta"):
        layout = original_layout(ImageCodec(CodecConfig()))
    assert tuple(layout["decoder.up.4.block.0.conv1.weight"].shape) == (512, 512, 3, 3)
    assert tuple(layout["decoder.up.3.block.0.nin_shortcut.weight"].shape) == (256, 512, 1, 1)
    assert tuple(layout["decoder.up.0.block.2.conv2.weight"].shape) == (128, 128, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in layout
    assert tuple(layout["quantize.embedding.weight"].shape) == (8192, 256)


def slow_decoder(weights, codes_BL, side, multipliers, layers):
    """The original release's decoder, layer by layer, by its names."""

    def convolution(name, x, padding):
        return functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 1, padding)

    def norm(name, x):
        return functional.group_norm(
            x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6
        )

    def residual(name, x):
        h = convolution(f"{name}.conv1", functional.silu(norm(f"{name}.norm1", x)), 1)
        h = convolution(f"{name}.conv2", functional.silu(norm(f"{name}.norm2", h)), 1)
        shortcut = f"{name}.nin_shortcut"
        return h + (convolution(shortcut, x, 0) if f"{shortcut}.weight" in weights else x)

    def attention(name, x):
        normed = norm(f"{name}.norm", x)
        q, k, v = (convolution(f"{name}.{part}", normed, 0).flatten(2) for part in "qkv")
        shares = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        seen = (v @ shares.transpose(1, 2)).view_as(x)
        return x + convolution(f"{name}.proj_out", seen, 0)

    vectors = weights["quantize.embedding.weight"][codes_BL].unflatten(1, (side, side))
    x = convolution("post_quant_conv", vectors.permute(0, 3, 1, 2), 0)
    x = residual("decoder.mid.block_1", convolution("decoder.conv_in", x, 1))
    x = residual("decoder.mid.block_2", attention("decoder.mid.attn_1", x))
    for level in reversed(range(len(multipliers))):
        for layer in range(layers + 1):
            x = residual(f"decoder.up.{level}.block.{layer}", x)
        if level > 0:
            larger = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = convolution(f"decoder.up.{level}.upsample.conv", larger, 1)
    return convolution("decoder.conv_out", functional.silu(norm("decoder.norm_out", x)), 1)


def test_the_originals_weights_give_the_originals_images():
    draw = torch.Generator().manual_seed(4)
    weights = {}
    for name, shape in original_names((1, 1, 2), 2).items():
        scale = 0.2 if "norm" in name else torch.Size(shape[1:]).numel() ** -0.5
        weights[name] = torch.randn(shape, generator=draw) * scale
        weights[name] += 1.0 if "norm" in name and name.endswith("weight") else 0.0
    codec = from_original_layout(weights, SIZE)
    codes_BL = torch.randint(64, (2, 64), generator=draw)
    expected_B3HW = slow_decoder(weights, codes_BL, 8, (1, 1, 2), 2)
    assert expected_B3HW.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(
        codec.decode(codes_BL), expected_B3HW.clamp(-1, 1), rtol=1e-4, atol=1e-4
    )
    assert expected_B3HW.clamp(-1, 1).std() > 0.1


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_a_codec_in_the_original_layout_loads_as_the_same_codec(codec, images_B3HW, tmp_path, kind):
    layout = {name: value.contiguous() for name, value in original_layout(codec).items()}
    # The release's file also has what its training needed.
    layout["loss.discriminator.main.0.weight"] = torch.zeros(2, 2)
    path = tmp_path / f"vqgan.{kind}"
    if kind == "ckpt":
        torch.save({"state_dict": layout, "epoch": 3}, path)
    else:
        save_file(layout, path)
    loaded = load_chameleon_codec(path, image_size=SIZE)
    assert loaded.config == SHAPE
    codes_BL = codec.encode(images_B3HW)
    assert torch.equal(loaded.encode(images_B3HW), codes_BL)
    assert torch.equal(loaded.decode(codes_BL), codec.decode(codes_BL))


def test_a_loaded_codec_can_be_trained_further(codec, images_B3HW):
    loaded = from_original_layout(original_layout(codec), SIZE).train()
    before = loaded.codebook.clone()
    loaded(images_B3HW)
    # Its codebook continues from where it was: k-means does not run again.
    assert 0 < (loaded.codebook - before).abs().mean() < 0.5 * before.abs().mean()


def test_other_weights_are_refused(codec, tmp_path):
    layout = original_layout(codec)
    with pytest.raises(UserError, match="image weights"):
        from_original_layout({}, SIZE)
    short = {name: value for name, value in layout.items() if "mid.block_2" not in name}
    with pytest.raises(UserError, match=r"missing: decoder\.mid\.block_2"):
        from_original_layout(short, SIZE)
    with pytest.raises(UserError, match=r"1 unknown: encoder\.color"):
        from_original_layout(layout | {"encoder.color": torch.zeros(1)}, SIZE)
    with pytest.raises(UserError, match=r"conv_in\.weight has shape"):
        from_original_layout(layout | {"encoder.conv_in.weight": torch.zeros(32, 3, 1, 1)}, SIZE)
    book = layout["quantize.embedding.weight"]
    with pytest.raises(UserError, match="not enough values"):
        from_original_layout(layout | {"quantize.embedding.weight": book.flatten()}, SIZE)
    turned = layout["quant_conv.weight"].transpose(0, 1)
    with pytest.raises(UserError, match=r"quant_conv\.weight has shape \(32, 16, 1, 1\) instead"):
        from_original_layout(layout | {"quant_conv.weight": turned}, SIZE)
    huge = torch.empty(2**40, 0, 3, 3)  # takes no memory, a layer of this width does
    with pytest.raises(UserError, match=r"conv1\.weight is empty"):
        from_original_layout(layout | {"encoder.down.0.block.0.conv1.weight": huge}, SIZE)
    inner = {"encoder.down.0.attn.0.q.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="innermost"):
        from_original_layout(layout | inner, SIZE)
    with pytest.raises(UserError, match="no multiple of 4"):
        from_original_layout(layout, 30)


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors", "missing.pt", "folder"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif not name.startswith("missing"):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=name):
        load_chameleon_codec(path)


def test_a_weight_with_and_without_a_prefix_is_refused(codec, tmp_path):
    layout = {name: value.contiguous() for name, value in original_layout(codec).items()}
    twice = {"model.vqmodel.quant_conv.bias": torch.zeros(16)}
    save_file(layout | twice, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"quant_conv\.bias occurs twice"):
        load_chameleon_codec(tmp_path / "a.safetensors")


def test_a_damaged_config_beside_the_weights_is_named(port, tmp_path):
    save_file(port.state_dict(), tmp_path / "model.safetensors")
    for content in ("{", "[]", '{"vq_config": 3}', '{"resolution": "large"}', '{"resolution": 0}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json"):
            load_chameleon_codec(tmp_path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Unpickled:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code was run')",))

    torch.save({"state_dict": Unpickled()}, tmp_path / "vqgan.ckpt")
    with pytest.raises(UserError, match="convert its state_dict to safetensors"):
        load_chameleon_codec(tmp_path / "vqgan.ckpt")


@pytest.mark.parametrize(
    "changes",
    [
        {"patch": 2},
        {"encoder_middle": False},
        {"encoder_context": False, "block_channels": [32]},
        {"norm_groups": 16},
    ],
)
def test_a_codec_of_another_shape_has_no_original_layout(changes):
    with torch.device("meta"):
        codec = ImageCodec(check(CodecConfig, SHAPE.model_dump() | changes, "codec"))
    with pytest.raises(UserError, match="Chameleon's layout needs a codec with patch = 1"):
        original_layout(codec)
