"""Names and configuration of Chameleon's `transformers` port, and their counterparts in moma.

Both apply rotary embeddings to the halves of a head, so only the names of weights differ.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from moma.errors import UserError
from moma.hub.folder import CONFIG_FILE, read_config
from moma.model.architecture import ModelConfig
from moma.recipe import Config, check
from moma.tokenizers.image.codec import CodecConfig
from moma.tokenizers.names import CHAMELEON
from moma.vocabulary import Vocabulary

IMAGE_PREFIX = "model.vqmodel."
_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
# The port's placeholder for an image in a prompt, and the reserved id that it gets.
_PLACEHOLDER, _RESERVED = "<image>", "<reserved:0>"

_TOP_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "experts_norm.weight": "post_attention_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.query_norm.bias": "self_attn.q_norm.bias",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "attention.key_norm.bias": "self_attn.k_norm.bias",
    "experts.groups.0.feed_forward.gate.weight": "mlp.gate_proj.weight",
    "experts.groups.0.feed_forward.up.weight": "mlp.up_proj.weight",
    "experts.groups.0.feed_forward.down.weight": "mlp.down_proj.weight",
}


class _Section(Config):
    """A part of `config.json`: missing keys have the port's defaults, unknown ones are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Rope(_Section):
    rope_type: Literal["default"] = "default"
    type: Literal["default"] = "default"
    rope_theta: float | None = Field(None, gt=0)


class VqConfig(_Section):
    """The port's `vq_config`: the shape of the image encoder."""

    resolution: int = Field(512, ge=1, le=2**13)
    base_channels: int = Field(128, ge=1)
    channel_multiplier: tuple[int, ...] = Field((1, 1, 2, 2, 4), min_length=1, max_length=13)
    num_res_blocks: int = Field(2, ge=1)
    latent_channels: int = Field(256, ge=1)
    embed_dim: int = Field(256, ge=1)
    num_embeddings: int = Field(8192, ge=1)
    attn_type: str = "vanilla"

    @property
    def codes_per_image(self) -> int:
        """Number of codes of one image."""
        return (self.resolution // 2 ** (len(self.channel_multiplier) - 1)) ** 2


class PortConfig(_Section):
    """The keys of the port's `config.json` that affect what is computed.

    Keys with a single value are options that moma does not have.
    """

    model_type: Literal["chameleon"]
    vocab_size: int = Field(65_536, ge=1, le=2**24)
    hidden_size: int = Field(4096, ge=1, le=2**20)
    intermediate_size: int = Field(11_008, ge=1, le=2**20)
    num_hidden_layers: int = Field(32, ge=1, le=2**10)
    num_attention_heads: int = Field(32, ge=1)
    num_key_value_heads: int = Field(32, ge=1)
    max_position_embeddings: int = Field(4096, ge=1, le=2**30)
    rms_norm_eps: float = Field(1e-5, gt=0, le=1)
    swin_norm: bool | None = False
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    rope_theta: float = Field(10_000.0, gt=0)
    attention_dropout: float | None = Field(0.0, ge=0, lt=1)
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] | None = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    vocabulary_map: dict[str, int] = Field(min_length=1)
    vq_config: VqConfig = VqConfig()


def read_port_config(folder: Path) -> PortConfig:
    """Read the `config.json` of a folder.

    Raises:
        UserError: it is missing or damaged, or describes a model that moma does not have.
    """
    return check(PortConfig, read_config(folder), str(folder / CONFIG_FILE))


def model_config(port: PortConfig, where: str) -> ModelConfig:
    """The configuration of the same model in moma.

    Raises:
        UserError: there is none; the message begins with `where`.
    """
    grouped = port.num_key_value_heads != port.num_attention_heads
    rope = port.rope_parameters or port.rope_scaling or _Rope()
    values = {
        "groups": "dense",
        "dim": port.hidden_size,
        "layers": port.num_hidden_layers,
        "heads": port.num_attention_heads,
        "kv_heads": port.num_key_value_heads if grouped else None,
        "hidden": port.intermediate_size,
        "norm": "swin" if port.swin_norm else "pre",
        "norm_epsilon": port.rms_norm_eps,
        "rope_theta": port.rope_theta if rope.rope_theta is None else rope.rope_theta,
    }
    return check(ModelConfig, values, where)


def require_expressible(config: ModelConfig, where: str) -> None:
    """Check that Chameleon has an architecture.

    Raises:
        UserError: the message names what Chameleon lacks.
    """
    groups = config.group_list
    used = {
        "experts": len(groups) > 1 or groups[0].experts > 1,
        "mixture-of-depths": bool(config.depth_layers),
        "attention without query_key_norm": not config.query_key_norm,
        "tied_embeddings (here they are scaled)": config.tied_embeddings,
    }
    if lacks := [name for name, is_used in used.items() if is_used]:
        raise UserError(f"{where}: Chameleon has no {', no '.join(lacks)}; use a model without")


def port_names(layers: int) -> dict[str, str]:
    """Our name of every weight of a dense model → the port's."""
    return _TOP_NAMES | {
        f"layers.{number}.{ours}": f"model.layers.{number}.{theirs}"
        for number in range(layers)
        for ours, theirs in _LAYER_NAMES.items()
    }


def chameleon_names(ids: dict[str, int], vocabulary: Vocabulary) -> dict[int, str]:
    """Chameleon's names of the special ids, the image codes and the image placeholder, by id.

    Args:
        ids: id of each name in the tokenizer, with moma's names or Chameleon's.
    """
    names = dict(zip(vocabulary.special, CHAMELEON.special, strict=True))
    for code, id_ in enumerate(vocabulary.image_codes):
        names[id_] = f"IMGIMG{str(code).translate(_LETTERS)}Z"
    if ids.get(_PLACEHOLDER) in (None, vocabulary.begin_image) and _RESERVED in ids:
        names[ids[_RESERVED]] = _PLACEHOLDER
    return names


def different_text_id(ids: dict[str, int], others: dict[str, int]) -> str | None:
    """The first name with another id in `others`; the placeholder's meaning differs anyway."""
    common = ids.keys() & others.keys() - {_PLACEHOLDER}
    return min((name for name in common if ids[name] != others[name]), default=None)


def rename_tokens(tokenizer_json: str, names: dict[int, str]) -> str:
    """A `tokenizer.json` in which the ids in `names` have these names.

    Raises:
        UserError: its model has no table of ids.
    """
    content = json.loads(tokenizer_json)
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise UserError(
            f"Chameleon has no tokenizers of type {content['model'].get('type')}; use BPE"
        )
    content["model"]["vocab"] = {names.get(id_, name): id_ for name, id_ in vocabulary.items()}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def port_config(
    model: ModelConfig,
    vocabulary: Vocabulary,
    names: dict[str, int],
    context: int,
    dtype: str,
    images: dict[str, Any],
) -> dict[str, Any]:
    """The port's `config.json` for a dense model.

    Args:
        names: id of each of Chameleon's names.
        dtype: PyTorch's name of the weights' dtype.
        images: the result of `vq_config`.
    """
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "dtype": dtype,
        "vocab_size": vocabulary.size,
        "hidden_size": model.dim,
        "intermediate_size": model.hidden_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.key_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": model.norm_epsilon,
        "swin_norm": model.norm == "swin",
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary.beginning,
        "eos_token_id": vocabulary.end,
        "pad_token_id": vocabulary.padding,
        "vocabulary_map": names,
        "vq_config": images,
    }


def vq_config(codec: CodecConfig) -> dict[str, Any]:
    """The port's `vq_config` for a codec of Chameleon's layout.

    Raises:
        UserError: its block widths are not multiples of the first.
    """
    base = codec.block_channels[0]
    if any(width % base for width in codec.block_channels):
        raise UserError("Chameleon's layout needs block_channels that are multiples of the first")
    return {
        "resolution": codec.image_size,
        "base_channels": base,
        "channel_multiplier": tuple(width // base for width in codec.block_channels),
        "num_res_blocks": codec.layers_per_block,
        "latent_channels": codec.latent_channels,
        "embed_dim": codec.code_channels,
        "num_embeddings": codec.codebook_size,
        "attn_type": "vanilla" if codec.middle_attention else "none",
    }


def small_vq_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The smallest `vq_config` with as many codes per image, used without image weights."""
    return {
        "resolution": round(vocabulary.codes_per_image**0.5),
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "latent_channels": 32,
        "embed_dim": 32,
        "num_embeddings": len(vocabulary.image_codes),
    }
