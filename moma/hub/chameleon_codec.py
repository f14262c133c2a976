"""Chameleon's image weights as an `ImageCodec`, and an `ImageCodec` as Chameleon's weights.

Two layouts are read. The original release has encoder, codebook and decoder, under the names of
taming-transformers (`encoder.down.0.block.0.conv1.weight`, …). The `transformers` port has the same
names without the decoder, alone or below `model.vqmodel.`. Both are networks that ours contains:
only names differ, and the attention's 1 × 1 convolutions, which are matrices here.
The names of Chameleon's tokenizer file are in `names.py`.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from moma.errors import UserError
from moma.recipe import check
from moma.runs import Tokenizers
from moma.tokenizers.folder import import_tokenizers
from moma.tokenizers.image.codec import CodecConfig, ImageCodec
from moma.vocabulary import Vocabulary

_IMAGE_SIZE = 512
_NORM_GROUPS = 32
_CODEBOOK, _ORIGINAL_CODEBOOK = "quantizer._codebook.embed", "quantize.embedding.weight"
_PREFIX = re.compile(r"^(model\.)?vqmodel\.")
_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
# Our spelling and the original's; blocks of the decoder are counted from the other end there.
_SPELLINGS = (
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


def import_chameleon_tokenizers(
    tokenizer: Path, weights: Path, folder: Tokenizers, image_size: int | None = None
) -> Vocabulary:
    """Make a folder of tokenizers from Chameleon's files.

    Args:
        tokenizer: its tokenizer file; a folder that holds a `tokenizer.json` will do.
        weights: its image weights; see `load_chameleon_codec`.
        folder: where they go.
        image_size: see `load_chameleon_codec`.

    Raises:
        UserError: a file cannot be read, the folder has tokenizers already, or the two do not fit.
    """
    return import_tokenizers(tokenizer, partial(load_chameleon_codec, weights, image_size), folder)


def load_chameleon_codec(path: Path, image_size: int | None = None) -> ImageCodec:
    """Read Chameleon's image weights, on the CPU and in evaluation mode.

    Args:
        path: a file of weights (safetensors, or what `torch.save` wrote), or a folder of the
            `transformers` port with one or more safetensors files.
        image_size: side of an image in pixels, which weights do not tell; left out, what the
            folder's `config.json` says, else Chameleon's 512.

    Raises:
        UserError: the weights cannot be read, or are not of Chameleon's kind.
    """
    tensors = _read(path)
    size = image_size or _resolution(path) or _IMAGE_SIZE
    try:
        return from_original_layout(tensors, size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_original_layout(tensors: dict[str, Tensor], image_size: int) -> ImageCodec:
    """A codec with weights under Chameleon's names; its shape is told by theirs.

    Raises:
        UserError: a weight is missing, unknown or of a shape that does not fit.
    """
    wanted_parts = {name for name in tensors if name.startswith(_PARTS)}
    codec = ImageCodec(_config(tensors, image_size))
    state = codec.state_dict()
    blocks = len(codec.config.block_channels)
    names = {name: _original_name(name, blocks) for name in _weights(codec)}
    missing = sorted(set(names.values()) - wanted_parts)
    unknown = sorted(wanted_parts - set(names.values()))
    if missing or unknown:
        raise UserError(
            "not Chameleon's image weights "
            f"({len(missing)} missing: {_some(missing)}; {len(unknown)} unknown: {_some(unknown)})"
        )
    for ours, theirs in names.items():
        tensor = tensors[theirs]
        if tensor.numel() != state[ours].numel():
            raise UserError(f"{theirs} has shape {tuple(tensor.shape)}, which does not fit")
        state[ours].copy_(tensor.reshape(state[ours].shape))
    # A codebook that goes on learning starts from these vectors, each seen once.
    state["quantizer._codebook.embed_avg"].copy_(state[_CODEBOOK])
    state["quantizer._codebook.cluster_size"].fill_(1)
    state["quantizer._codebook.initted"].fill_(True)
    return codec.eval()


def original_layout(codec: ImageCodec) -> dict[str, Tensor]:
    """The weights of a codec under the names and shapes of Chameleon's original release.

    Raises:
        UserError: the codec has no such shape.
    """
    config = codec.config
    if config.patch != 1 or not config.encoder_middle or config.norm_groups != _NORM_GROUPS:
        raise UserError(
            "Chameleon's layout needs a codec with patch = 1, encoder_middle = true and "
            f"norm_groups = {_NORM_GROUPS}"
        )
    tensors = {}
    for name, value in _weights(codec).items():
        original = _original_name(name, len(config.block_channels))
        if value.dim() == 2 and ".attn_1." in original:
            value = value[:, :, None, None]
        tensors[original] = value[0] if name == _CODEBOOK else value
    return tensors


def _weights(codec: ImageCodec) -> dict[str, Tensor]:
    """What a codec knows, without how it learns."""
    state = codec.state_dict()
    return {
        name: value
        for name, value in state.items()
        if not name.startswith("quantizer.") or name == _CODEBOOK
    }


def _original_name(name: str, blocks: int) -> str:
    """Chameleon's name of one of our weights."""
    if name == _CODEBOOK:
        return _ORIGINAL_CODEBOOK
    name = re.sub(
        r"\.up_blocks\.(\d+)", lambda match: f".up_blocks.{blocks - 1 - int(match[1])}", name
    )
    for ours, theirs in _SPELLINGS:
        name = re.sub(ours, theirs, name)
    return name


def _config(tensors: dict[str, Tensor], image_size: int) -> CodecConfig:
    """The shape of the codec that these weights are of."""
    if any(re.match(r"encoder\.down\.\d+\.attn\.", name) for name in tensors):
        raise UserError("weights with attention outside of the innermost block are not supported")
    blocks = 1 + max(
        (int(m[1]) for name in tensors if (m := re.match(r"encoder\.down\.(\d+)\.block\.", name))),
        default=-1,
    )
    layers = sum(
        bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", n)) for n in tensors
    )
    try:
        codebook_size, code_channels = tensors[_ORIGINAL_CODEBOOK].shape
        values = {
            "image_size": image_size,
            "block_channels": [
                len(tensors[f"encoder.down.{block}.block.0.conv1.weight"])
                for block in range(blocks)
            ],
            "layers_per_block": layers,
            "latent_channels": len(tensors["encoder.conv_out.weight"]),
            "code_channels": code_channels,
            "codebook_size": codebook_size,
            "middle_attention": "encoder.mid.attn_1.q.weight" in tensors,
            "norm_groups": _NORM_GROUPS,
            "decoder": "decoder.conv_in.weight" in tensors,
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"not Chameleon's image weights (no {error})") from error
    return check(CodecConfig, values, "the shape of the weights")


def _read(path: Path) -> dict[str, Tensor]:
    """The image weights in a file or folder, in float32, without the prefix of a whole model."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: holds no safetensors file")
    found: dict[str, Tensor] = {}
    for file in files:
        found |= _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    return {_PREFIX.sub("", name): value.float() for name, value in found.items()}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as tensors:
            # A file may hold a whole language model beside the image weights.
            names = [name for name in tensors.keys() if _is_ours(name)]  # noqa: SIM118
            return {name: tensors.get_tensor(name) for name in names}
    except Exception as error:  # the library's own exception derives from nothing else
        raise UserError(f"{file}: cannot read the weights ({error})") from error


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        values: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the reader raise nearly anything
        raise UserError(
            f"{file}: cannot read the weights ({str(error).splitlines()[0]}); if it holds more "
            "than tensors, save its state_dict as safetensors where you trust it"
        ) from error
    values = values.get("state_dict", values) if isinstance(values, dict) else {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) and _is_ours(name)
    }


def _is_ours(name: str) -> bool:
    return _PREFIX.sub("", name).startswith(_PARTS)


def _resolution(path: Path) -> int | None:
    """Side of an image by the port's `config.json`, if the folder has one."""
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return int(values.get("vq_config", values)["resolution"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) or "none"
