"""Text tokenizer: byte-level BPE in one `tokenizer.json`, image codes and special ids included.

A `tokenizer.json` holds the whole vocabulary by name, so that `Vocabulary` can be read off it and
any reader of the format sees the ids that the model sees.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from moma.errors import UserError
from moma.recipe import Config
from moma.vocabulary import Vocabulary

SPECIAL_NAMES = ("<s>", "</s>", "<pad>", "<image>", "</image>")
_CODE_NAME = re.compile(r"<code:(\d+)>")


class TextTokenizerConfig(Config):
    """How the text tokenizer is trained.

    Attributes:
        vocabulary_size: ids of text, special ids and image codes together (MoMa §2.1).
        documents: how many documents of each source it reads, from the first on.
    """

    vocabulary_size: int = Field(65_536, ge=300)
    documents: int = Field(1_000_000, ge=1)


def train_text_tokenizer(
    config: TextTokenizerConfig, texts: Iterable[str], codebook_size: int
) -> Tokenizer:
    """Learn byte-level BPE merges and append the ids of the image codes.

    Raises:
        UserError: the vocabulary has no room for 256 bytes, the special ids and the codes.
    """
    text_size = config.vocabulary_size - codebook_size
    if text_size < 256 + len(SPECIAL_NAMES):
        raise UserError(
            f"text_tokenizer.vocabulary_size = {config.vocabulary_size} leaves no room for "
            f"{codebook_size} image codes, 256 bytes and {len(SPECIAL_NAMES)} special ids; "
            f"make it at least {codebook_size + 256 + len(SPECIAL_NAMES)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_size,
        special_tokens=list(SPECIAL_NAMES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(f"<code:{code}>", special=True) for code in range(codebook_size)]
    )
    return _plain(tokenizer)


def load_text_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        UserError: the file is missing or no tokenizer.
    """
    try:
        return _plain(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path}: cannot read the tokenizer ({error}); run `moma prepare`"
        ) from error


def vocabulary_of(tokenizer: Tokenizer, codes_per_image: int) -> Vocabulary:
    """The vocabulary by the names in the tokenizer file."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    codes = sorted(
        (int(match[1]), ids[name]) for name in ids if (match := _CODE_NAME.fullmatch(name))
    )
    beginning, end, padding, begin_image, end_image = (ids[name] for name in SPECIAL_NAMES)
    return Vocabulary(
        size=max(ids.values()) + 1,
        beginning=beginning,
        end=end,
        padding=padding,
        begin_image=begin_image,
        end_image=end_image,
        image_codes=tuple(id_ for _, id_ in codes),
        codes_per_image=codes_per_image,
    )


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text.

    Raises:
        UserError: a text is not Unicode: it holds half of a surrogate pair.
    """
    try:
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    except TypeError as error:  # how the library refuses it
        broken = next(text for text in texts if re.search("[\ud800-\udfff]", text))
        raise UserError(
            f"the text {broken[:80]!a}: a prompt or text must be valid UTF-8"
        ) from error
    return [encoding.ids for encoding in encodings]


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Let the name of a special id in a user's text be ordinary text."""
    tokenizer.encode_special_tokens = True
    return tokenizer
