"""Text tokenizer: byte-level BPE in one `tokenizer.json`, image codes and special ids included.

A `tokenizer.json` holds the whole vocabulary by name, so that `Vocabulary` can be read off it and
any reader of the format sees the ids that the model sees.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from operator import attrgetter
from pathlib import Path

from pydantic import Field
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from moma.errors import UserError
from moma.recipe import Config
from moma.tokenizers.names import OURS, names_in, read_vocabulary
from moma.vocabulary import Vocabulary

_PAPER_SIZE = 65_536
_PAPER_RESERVED = 256
_STRAY_BYTE = re.compile("[\udc80-\udcff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextTokenizerConfig(Config):
    """How the text tokenizer is trained.

    Attributes:
        vocabulary_size: ids of text, special ids and image codes together (MoMa §2.1).
        max_documents: how many documents of each source it reads, from the first on.
        reserved: ids `<reserved:N>` without a meaning yet, for later modalities; left out, 256 in
            a vocabulary of 65,536 or more and none in a smaller one.
    """

    vocabulary_size: int = Field(_PAPER_SIZE, ge=300)
    max_documents: int = Field(1_000_000, ge=1)
    reserved: int | None = Field(None, ge=0)

    @property
    def reserved_names(self) -> list[str]:
        """Names of the reserved ids."""
        usual = _PAPER_RESERVED if self.vocabulary_size >= _PAPER_SIZE else 0
        count = usual if self.reserved is None else self.reserved
        return [f"<reserved:{number}>" for number in range(count)]


def train_text_tokenizer(
    config: TextTokenizerConfig, texts: Iterable[str], codebook_size: int
) -> Tokenizer:
    """Learn byte-level BPE merges and append the ids of the image codes.

    Raises:
        UserError: the vocabulary has no room for 256 bytes, the special ids and the codes.
    """
    text_size = config.vocabulary_size - codebook_size
    special = [*OURS.special, *config.reserved_names]
    if text_size < 256 + len(special):
        raise UserError(
            f"text_tokenizer.vocabulary_size = {config.vocabulary_size} leaves no room for "
            f"{codebook_size} image codes, 256 bytes and {len(special)} special ids; "
            f"make it at least {codebook_size + 256 + len(special)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(f"<code:{code}>", special=True) for code in range(codebook_size)]
    )
    return _plain(tokenizer)


def load_text_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, spelled our way or Chameleon's.

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
    """The vocabulary by the names in the tokenizer file.

    Raises:
        UserError: a special id or an image code is missing.
    """
    return read_vocabulary(tokenizer.get_vocab(with_added_tokens=True), codes_per_image)


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text.

    Raises:
        UserError: a text is not Unicode: it holds half of a surrogate pair.
    """
    return list(encode_each(tokenizer, texts))


def encode_each(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """The same, each list made when it is asked for: a list that is dropped at once costs less.

    Raises:
        UserError: at once, as `encode_texts`.
    """
    try:
        # The same ids, without where in the text each stands.
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except TypeError as error:  # how the library refuses it
        broken = next(text for text in texts if _SURROGATE.search(text))
        raise UserError(
            f"the text {broken[:80]!a}: a prompt or text must be valid UTF-8"
        ) from error
    return map(attrgetter("ids"), encodings)


def encode_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Ids of any bytes; what is no UTF-8 takes one id a byte.

    Raises:
        UserError: there are such bytes, and the tokenizer is not byte-level.
    """
    # Python's own way to carry stray bytes in a text: one lone surrogate each.
    text = data.decode("utf-8", "surrogateescape")
    ids: list[int] = []
    for part in re.split(f"({_STRAY_BYTE.pattern})", text):
        if not _STRAY_BYTE.fullmatch(part):
            ids += encode_texts(tokenizer, [part])[0]
            continue
        id_ = tokenizer.token_to_id(_byte_letters()[ord(part) - 0xDC00])
        if id_ is None:
            raise UserError("the text is not UTF-8, and this tokenizer has no ids for single bytes")
        ids.append(id_)
    return ids


def decode_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    """The bytes that ids stand for, special ids by their names; undoes `encode_bytes`."""
    ids = list(ids)
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return tokenizer.decode(ids, skip_special_tokens=False).encode()
    byte_of = {letter: byte for byte, letter in _byte_letters().items()}
    added = tokenizer.get_added_tokens_decoder()
    parts = []
    for id_ in ids:
        piece = tokenizer.id_to_token(id_) or ""
        parts.append(piece.encode() if id_ in added else bytes(byte_of[c] for c in piece))
    return b"".join(parts)


@cache
def _byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte (Radford et al. 2019).

    Bytes that print as a letter of Latin-1 are that letter; the others follow from 256 on.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Let the name of a special id or an image code in a user's text be ordinary text."""
    tokenizer.encode_special_tokens = True
    names = names_in(tokenizer.get_vocab(with_added_tokens=True))
    # A file of another maker may list them as words like any other.
    words = [
        token.content
        for token in tokenizer.get_added_tokens_decoder().values()
        if not token.special
        and (token.content in names.special or names.code.fullmatch(token.content))
    ]
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words])
    return tokenizer
