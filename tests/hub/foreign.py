"""Imitated files of others: weights of VGG-16's shape, a tokenizer file with Chameleon's names."""

import json

import torch

from moma.tokenizers.text import TextTokenizerConfig, train_text_tokenizer

CODES = 205


def chameleon_code(code: int) -> str:
    """Chameleon's name of an image code."""
    return "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def chameleon_file(as_words: bool, special: bool) -> str:
    """A small file with the structure of Chameleon's.

    Args:
        as_words: whether image codes are entries of the model's vocabulary, or added tokens.
        special: whether added tokens are marked as special.
    """
    config = TextTokenizerConfig(vocabulary_size=300)
    values = json.loads(train_text_tokenizer(config, ["a b " * 9], 0).to_str())
    text = {piece: id_ for piece, id_ in values["model"]["vocab"].items() if id_ > 4}
    # Ids have a gap, and codes another order than in the codebook.
    codes = {chameleon_code(code): 500 + (code * 7) % CODES for code in range(CODES)}
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<racm3:break>": 800, "<eoss>": 801, "<image>": 802}
    values["model"]["vocab"] = {p: 10 + n for n, p in enumerate(text)} | names
    values["model"]["vocab"] |= codes if as_words else {}
    added = names if as_words else names | codes
    values["added_tokens"] = [
        {
            "id": id_,
            "content": name,
            "special": special,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for name, id_ in sorted(added.items(), key=lambda item: item[1])
    ]
    if not as_words:
        values["model"]["vocab"] |= codes
    return json.dumps(values)


# VGG-16's convolutions: index of the layer in torchvision, channels in and out.
VGG = (
    (0, 3, 64),
    (2, 64, 64),
    (5, 64, 128),
    (7, 128, 128),
    (10, 128, 256),
    (12, 256, 256),
    (14, 256, 256),
    (17, 256, 512),
    (19, 512, 512),
    (21, 512, 512),
    (24, 512, 512),
    (26, 512, 512),
    (28, 512, 512),
)


def random_vgg() -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, the classifier's too."""
    draw = torch.Generator().manual_seed(0)
    weights = {"classifier.6.bias": torch.zeros(10)}
    for number, before, after in VGG:
        scale = (2 / (9 * before)) ** 0.5
        size = (after, before, 3, 3)
        weights[f"features.{number}.weight"] = torch.randn(size, generator=draw) * scale
        weights[f"features.{number}.bias"] = torch.randn(after, generator=draw) * 0.1
    return weights
