"""Chameleon's image weights as an `ImageCodec`, and an `ImageCodec` as Chameleon's weights.

The original release has encoder, codebook and decoder, under the names of taming-transformers. The
`transformers` port has the same names without the decoder, possibly below `model.vqmodel.`. They
differ from ours in names, and in the attention's 1 × 1 convolutions, which are matrices here.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moma.errors import UserError
from moma.hub.chameleon_format import VqConfig, vq_config
from moma.hub.folder import CONFIG_FILE
from moma.recipe import check
from moma.runtime.weights import open_weights, read_json_object, read_tensors, require_match
from moma.tokenizers.image.codec import CodecConfig, ImageCodec

_IMAGE_SIZE = 512
_NORM_GROUPS = 32
_CODEBOOK, _ORIGINAL_CODEBOOK = "quantizer._codebook.embed", "quantize.embedding.weight"
_PREFIX = re.compile(r"^(model\.)?vqmodel\.")
# Other parts of a release: the language model, and the losses that the codec was trained with.
_NO_IMAGE_WEIGHT = re.compile(
    r"(model\.(embed_tokens|layers|norm)|lm_head|loss|(model\.)?rotary_emb)\.|position_ids$"
)
# Our names → the original's, which counts the decoder's blocks in the opposite direction.
_RENAMED = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def load_chameleon_codec(path: Path, image_size: int | None = None) -> ImageCodec:
    """Read Chameleon's image weights, on the CPU and in evaluation mode.

    Args:
        path: a file of weights (safetensors, or what `torch.save` wrote), or a folder of the
            `transformers` port, read as `open_weights` does.
        image_size: side of an image in pixels, which the weights do not determine; by default
            `resolution` in the folder's `config.json`, else Chameleon's 512.

    Raises:
        UserError: the weights cannot be read, are not Chameleon's, or contradict `config.json`.
    """
    declared = _declared_shape(path)
    size, tensors = image_size or declared.get("resolution", _IMAGE_SIZE), _read(path)
    try:
        codec = from_original_layout(tensors, size)
        shape = vq_config(codec.config) if declared else {}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for key in declared.keys() - {"resolution"}:
        if shape[key] != declared[key]:
            raise UserError(
                f"{path / CONFIG_FILE}: {key} = {declared[key]}, but the weights have "
                f"{shape[key]}; get a complete copy of the folder"
            )
    return codec


def from_original_layout(tensors: dict[str, Tensor], image_size: int) -> ImageCodec:
    """Build a codec from weights under Chameleon's names; its shape follows from theirs.

    Raises:
        UserError: a weight is missing, unknown, not finite, or of the wrong shape or dtype.
    """
    # An empty tensor takes no memory whatever its other dimensions, but a layer of its shape does.
    if empty := [name for name, tensor in tensors.items() if not tensor.numel()]:
        raise UserError(f"{empty[0]} is empty; get a complete copy")
    config = _config(tensors, image_size)
    with torch.device("meta"):  # shapes are compared before memory is allocated
        expected = original_layout(ImageCodec(config))
    require_match(tensors, expected, "not Chameleon's image weights")
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{wrong[0]} has NaN or infinite values; get a complete copy")
    codec = ImageCodec(config)
    state = codec.state_dict()
    for ours in _weights(codec):
        theirs = _original_name(ours, len(config.block_channels))
        state[ours].copy_(tensors[theirs].reshape(state[ours].shape))
    # Further training starts from these codebook vectors, each counted once.
    state["quantizer._codebook.embed_avg"].copy_(state[_CODEBOOK])
    state["quantizer._codebook.cluster_size"].fill_(1)
    state["quantizer._codebook.initted"].fill_(True)
    return codec.eval()


def original_layout(codec: ImageCodec) -> dict[str, Tensor]:
    """The weights of a codec under the names and shapes of Chameleon's original release.

    Raises:
        UserError: Chameleon's layout cannot express the codec.
    """
    config = codec.config
    is_complete = config.encoder_context and config.encoder_middle
    if config.patch != 1 or not is_complete or config.norm_groups != _NORM_GROUPS:
        raise UserError(
            "Chameleon's layout needs a codec with patch = 1, encoder_context = true, "
            f"encoder_middle = true and norm_groups = {_NORM_GROUPS}"
        )
    tensors = {}
    for name, value in _weights(codec).items():
        original = _original_name(name, len(config.block_channels))
        if value.dim() == 2 and ".attn_1." in original:
            value = value[:, :, None, None]
        tensors[original] = value[0] if name == _CODEBOOK else value
    return tensors


def _weights(codec: ImageCodec) -> dict[str, Tensor]:
    """The weights that encode and decode, without the codebook's training statistics."""
    return {
        name: value
        for name, value in codec.state_dict().items()
        if not name.startswith("quantizer.") or name == _CODEBOOK
    }


def _original_name(name: str, blocks: int) -> str:
    """Chameleon's name of one of our weights."""
    if name == _CODEBOOK:
        return _ORIGINAL_CODEBOOK
    for ours, theirs in _RENAMED:
        name = re.sub(ours, theirs, name)
    return re.sub(r"\.up\.(\d+)", lambda match: f".up.{blocks - 1 - int(match[1])}", name)


def _config(tensors: dict[str, Tensor], image_size: int) -> CodecConfig:
    """The configuration of the codec that these weights belong to."""
    if any(re.match(r"encoder\.down\.\d+\.attn\.", name) for name in tensors):
        raise UserError(
            "attention outside of the innermost block is not supported; use Chameleon's weights"
        )
    channels: list[int] = []
    layers = 0
    try:
        codebook_size, code_channels = tensors[_ORIGINAL_CODEBOOK].shape
        while (name := f"encoder.down.{len(channels)}.block.0.conv1.weight") in tensors:
            channels.append(len(tensors[name]))
        while f"encoder.down.0.block.{layers}.conv1.weight" in tensors:
            layers += 1
        values = {
            "image_size": image_size,
            "block_channels": channels,
            "layers_per_block": layers,
            "latent_channels": len(tensors["encoder.conv_out.weight"]),
            "code_channels": code_channels,
            "codebook_size": codebook_size,
            "middle_attention": "encoder.mid.attn_1.q.weight" in tensors,
            "norm_groups": _NORM_GROUPS,
            "decoder": "decoder.conv_in.weight" in tensors,
        }
    except KeyError as error:
        raise UserError(
            f"not Chameleon's image weights (no {error}); name those of a release"
        ) from error
    except (ValueError, TypeError) as error:  # a tensor has too few dimensions, or too many
        raise UserError(
            f"not Chameleon's image weights ({error}); name those of a release"
        ) from error
    return check(CodecConfig, values, "the shape of the weights")


def _read(path: Path) -> dict[str, Tensor]:
    """The image weights in a file or folder, without the prefix of a whole model."""
    if path.is_dir():
        weights = open_weights(path)
        tensors = weights.read(filter(_is_image_weight, weights.meta_tensors))
    else:
        tensors = read_tensors(path, _is_image_weight)
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        short = _PREFIX.sub("", name)
        if short in found:
            raise UserError(f"{path}: {short} occurs twice, once with a model's prefix; keep one")
        found[short] = value
    return found


def _is_image_weight(name: str) -> bool:
    return not _NO_IMAGE_WEIGHT.match(name)


def _declared_shape(path: Path) -> dict[str, Any]:
    """The codec's shape in a folder's `config.json`, by the port's names; empty without one."""
    file = path / CONFIG_FILE
    if not file.is_file():
        return {}
    values = read_json_object(file)
    values = values.get("vq_config", values)
    if not isinstance(values, dict):
        raise UserError(f"{file}: vq_config is not an object; get a complete copy")
    return check(VqConfig, values, str(file)).model_dump(exclude_unset=True)
