"""`transformers`' port of Chameleon, small and with random weights."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moma.model.routing import Auxiliary, uniform_routing
from moma.runs import Run
from moma.train.restore import load_run

CODES, SIDE = 16, 16
CODES_PER_IMAGE = (SIDE // 2) ** 2
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
VOCABULARY = 256 + len(SPECIAL) + CODES + 37
VQ = {
    "resolution": SIDE,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "embed_dim": 16,
    "num_embeddings": CODES,
}


def chameleon_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with Chameleon's names, special ids and codes first as in its file."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = [f"IMGIMG{str(code).translate(letters)}Z" for code in range(CODES)]
    # Names are in alphabetical order, not in that of their numbers.
    reserved = [f"<reserved{number:05}>" for number in range(8706, 8740)]
    special = [*SPECIAL, *sorted(codes), "<eoss>", "<racm3:break>", "<image>", *reserved]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {name: id_ for id_, name in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


def random_port(seed=0, **changes):
    """The port with random weights; norms and biases too."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "vocabulary_map": chameleon_tokenizer().get_vocab(with_added_tokens=True),
        "vq_config": VQ,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    } | changes
    torch.manual_seed(seed)
    model = ChameleonForConditionalGeneration(ChameleonConfig(**values)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(float(name.endswith("weight")), 0.3)
            else:
                weight.normal_(0, 1 if "embed" in name else weight[0].numel() ** -0.5)
    return model


def random_settings(seed: int, swin: bool, grouped: bool) -> dict[str, Any]:
    """A small shape; the hidden width is Chameleon's, int(2 · 4d / 3) rounded up, or any."""
    draw = random.Random(seed)
    heads = draw.choice([2, 4, 6])
    width = heads * draw.choice([8, 16, 24])
    usual = -(-int(2 * 4 * width / 3) // 256) * 256
    return {
        "swin_norm": swin,
        "hidden_size": width,
        "intermediate_size": draw.choice([usual, draw.randint(16, 200)]),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2) if n < heads]) if grouped else heads,
        "rms_norm_eps": draw.choice([1e-5, 1e-3]),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([1e4, 300.0])},
    }


def save(model, folder: Path, shard_size: str = "50GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard_size)
    chameleon_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit, types too."""
    first, second = weights_in(one), weights_in(other)
    assert first.keys() == second.keys() and len(first) > 30
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8)), name


def mixed_sequences(seed: int = 1) -> torch.Tensor:
    """Two sequences of text around an image."""
    draw = torch.Generator().manual_seed(seed)
    ids = chameleon_tokenizer().get_vocab(with_added_tokens=True)
    codes = torch.tensor(sorted(id_ for name, id_ in ids.items() if name.startswith("IMGIMG")))
    text_BS = torch.randint(24, len(ids), (2, 20), generator=draw)
    image_BL = codes[torch.randint(CODES, (2, CODES_PER_IMAGE), generator=draw)]
    ends = [torch.full((2, 1), ids[name]) for name in ("<racm3:break>", "<eoss>")]
    parts = [text_BS[:, :12], ends[0], image_BL, ends[1], text_BS[:, 12:]]
    return torch.cat([torch.zeros(2, 1, dtype=torch.long), *parts], dim=1)


@torch.no_grad()
def port_logits(model, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Its own forward masks the image codes."""
    return model.lm_head(model.model(tokens_BS).last_hidden_state)


@torch.no_grad()
def our_logits(run: Run, tokens_BS: torch.Tensor) -> torch.Tensor:
    model, _ = load_run(run)
    return model.cpu()(tokens_BS, routing=uniform_routing(Auxiliary())).head


def edit(folder: Path, **changes) -> None:
    """Change a folder's `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
