"""Text tokenizer: byte-level BPE in a `tokenizer.json` that also names special ids and codes."""

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import count
from operator import attrgetter
from pathlib import Path
from queue import Full, Queue

from pydantic import Field
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moma.errors import UserError, error_reason
from moma.files import read_bounded
from moma.progress import ProgressCallback
from moma.recipe import Config
from moma.tokenizers.names import OURS, names_in, read_vocabulary
from moma.vocabulary import MAX_SIZE, Vocabulary

_PAPER_SIZE = 65_536
_PAPER_RESERVED = 256
# Learning merges takes time quadratic in the length of a word, so longer words are split.
_MAX_WORD_LENGTH = 1024
# GPT-2's words (Radford et al. 2019) with limited lengths.
_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}{1,$}| ?\p{N}{1,$}| ?[^\s\p{L}\p{N}]{1,$}"
    r"|\s{1,$}(?!\S)|\s{1,$}"
).replace("$", str(_MAX_WORD_LENGTH))
# A space that begins a word, in any script.
_BETWEEN_WORDS = re.compile(r"(?<=\w) (?=\w)")
# Characters before and after a cut that are compared, and searched for a space.
_CONTEXT = 4096
_TEXTS_IN_QUEUE = 256
_SECONDS_BETWEEN_CHECKS = 0.2
_UNDECODED_BYTE = re.compile("[\udc80-\udcff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class TextTokenizerConfig(Config):
    """How the text tokenizer is trained.

    Attributes:
        vocabulary_size: number of ids: text, special ids and image codes together (MoMa §2.1).
        max_documents: maximum number of documents of each source to train on; of more, they are
            drawn at random.
        reserved: number of unused ids `<reserved:N>`, for later modalities; by default 256 in a
            vocabulary of 65,536 or more and none in a smaller one.
    """

    vocabulary_size: int = Field(_PAPER_SIZE, ge=300, le=MAX_SIZE)
    max_documents: int = Field(1_000_000, ge=1, le=10**9)
    reserved: int | None = Field(None, ge=0, le=2**20)

    @property
    def reserved_names(self) -> list[str]:
        """Names of the reserved ids."""
        default = _PAPER_RESERVED if self.vocabulary_size >= _PAPER_SIZE else 0
        number = default if self.reserved is None else self.reserved
        return [f"<reserved:{index}>" for index in range(number)]


def train_text_tokenizer(
    config: TextTokenizerConfig,
    texts: Iterable[str],
    codebook_size: int,
    progress: ProgressCallback | None = None,
) -> Tokenizer:
    """Learn byte-level BPE merges and append the ids of the image codes.

    Words longer than 1,024 characters are split, here and by all readers of the tokenizer file, so
    that time grows linearly with the text. Ctrl-C ends the training at once.

    Args:
        texts: training texts; iterated in the calling thread.
        progress: called with the number of texts read so far.

    Raises:
        UserError: the vocabulary is too small for 256 bytes, the special ids and the codes.
    """
    text_size = config.vocabulary_size - codebook_size
    special = [*OURS.special, *config.reserved_names]
    if text_size < 256 + len(special):
        raise UserError(
            f"text_tokenizer.vocabulary_size = {config.vocabulary_size} is too small for "
            f"{codebook_size} image codes, 256 bytes and {len(special)} special ids; "
            f"make it at least {codebook_size + 256 + len(special)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train_in_thread(tokenizer, trainer, texts, progress)
    tokenizer.add_special_tokens(
        [AddedToken(f"<code:{code}>", special=True) for code in range(codebook_size)]
    )
    return _disable_special_names(tokenizer)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, bytes_])


def _train_in_thread(
    tokenizer: Tokenizer,
    trainer: trainers.BpeTrainer,
    texts: Iterable[str],
    progress: ProgressCallback | None,
) -> None:
    """Run the trainer in a daemon thread: in the main thread, signals would wait for its end."""
    queue: Queue[str | None] = Queue(_TEXTS_IN_QUEUE)
    canceled = threading.Event()
    failures: list[BaseException] = []

    def read() -> Iterator[str]:
        while (text := queue.get()) is not None and not canceled.is_set():
            yield text
        if canceled.is_set():
            raise InterruptedError  # so that no merges are learned

    def train() -> None:
        try:
            tokenizer.train_from_iterator(read(), trainer)
        except BaseException as error:
            failures.append(error)
            while not canceled.is_set() and queue.get() is not None:
                pass

    thread = threading.Thread(target=train, name="text tokenizer", daemon=True)
    thread.start()
    number = 0
    try:
        for number, text in enumerate(texts, 1):
            queue.put(text)
            if progress and number % _TEXTS_IN_QUEUE == 0:
                progress(number, "texts")
    except BaseException:
        canceled.set()
        with suppress(Full):
            queue.put_nowait(None)
        raise
    queue.put(None)
    while thread.is_alive():
        if progress:
            progress(number, "texts; learning merges")
        thread.join(_SECONDS_BETWEEN_CHECKS)
    if failures:
        raise failures[0]


def load_text_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json` with our names or Chameleon's.

    Raises:
        UserError: the file is missing or not a tokenizer.
    """
    try:
        return _disable_special_names(Tokenizer.from_buffer(read_bounded(path)))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path}: cannot read the tokenizer ({error_reason(error)}); run `moma prepare`"
        ) from error


def vocabulary_of(tokenizer: Tokenizer, codes_per_image: int) -> Vocabulary:
    """Build the vocabulary from the names in the tokenizer.

    Raises:
        UserError: a special id or an image code is missing.
    """
    return read_vocabulary(tokenizer.get_vocab(with_added_tokens=True), codes_per_image)


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each text, tokenized together; each list is created when it is read.

    Raises:
        UserError: a text is not valid Unicode: it contains half of a surrogate pair.
    """
    try:
        # The fast variant does not compute character offsets.
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except TypeError as error:  # raised by the library for surrogates
        broken = next(text for text in texts if _SURROGATE.search(text))
        raise UserError(
            f"the text {broken[:80]!a}: a prompt or text must be valid UTF-8"
        ) from error
    return map(attrgetter("ids"), encodings)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text, tokenized in pieces, between which Ctrl-C ends it; see `split_text`."""
    pieces = split_text(tokenizer, text)
    return [id_ for piece in pieces for id_ in next(encode_texts(tokenizer, [piece]))]


def split_text(tokenizer: Tokenizer, text: str, max_characters: int = 2**16) -> list[str]:
    """Cut a long text between words: the ids of the pieces are together those of the text.

    Tokenizing a piece takes less than a second, during which Ctrl-C waits. A text is not cut where
    the tokenizer's words depend on more than the words around them. A word of `max_characters`,
    which only tokenizers from elsewhere have, is cut into several, since the time to tokenize it
    would grow with the square of its length.
    """
    pieces, start = [], 0
    while len(text) - start > max_characters and tokenizer.pre_tokenizer is not None:
        end = start + max_characters
        cut = _find_cut(tokenizer, text[start:end], text[end : end + _CONTEXT])
        if cut is None:
            break
        pieces.append(text[start : start + cut])
        start += cut
    return [*pieces, text[start:]]


def _find_cut(tokenizer: Tokenizer, window: str, following: str) -> int | None:
    """Where a word begins, near the end of the window; None if no word can be separated."""

    def separates(cut: int, context: int) -> bool:
        left, right = window[max(0, cut - context) : cut], (window[cut:] + following)[:context]
        words, left_words, right_words = (
            [word for word, _ in _words(tokenizer, part)] for part in (left + right, left, right)
        )
        return words == left_words + right_words

    spaces = _BETWEEN_WORDS.finditer(window, max(0, len(window) - _CONTEXT))
    for cut in [space.start() for space in spaces][:-4:-1]:
        if separates(cut, _CONTEXT):
            return cut
    # The last word may continue after the window, and so may a run of spaces.
    starts = [begin for _, (begin, _) in _words(tokenizer, window) if begin]
    for cut in starts[:-4:-1]:
        if separates(cut, len(window)):
            return cut
    return None if starts else len(window)


def _words(tokenizer: Tokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    """The words that merges do not cross, and where each begins and ends."""
    normalizer = tokenizer.normalizer
    normalized = text if normalizer is None else normalizer.normalize_str(text)
    return tokenizer.pre_tokenizer.pre_tokenize_str(normalized)


def encode_bytes(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Token ids of any bytes; a byte that is not part of valid UTF-8 becomes one id.

    Raises:
        UserError: there are such bytes, and the tokenizer is not byte-level.
    """
    # Python decodes an invalid byte to one unpaired surrogate.
    text = data.decode("utf-8", "surrogateescape")
    ids: list[int] = []
    for part in re.split(f"({_UNDECODED_BYTE.pattern})", text):
        if not _UNDECODED_BYTE.fullmatch(part):
            ids += encode_text(tokenizer, part)
            continue
        id_ = tokenizer.token_to_id(_byte_letters()[ord(part) - 0xDC00])
        if id_ is None:
            raise UserError(
                "the text is not UTF-8, and this tokenizer has no ids for bytes; use UTF-8"
            )
        ids.append(id_)
    return ids


def decode_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> bytes:
    """Bytes of a sequence of ids, special ids by their names; the inverse of `encode_bytes`."""
    ids = list(ids)
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return tokenizer.decode(ids, skip_special_tokens=False).encode()
    return b"".join(decode_each(tokenizer, ids))


def decode_each(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[bytes]:
    """Bytes of each id by itself, special ids by their names."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        for id_ in ids:
            yield tokenizer.decode([id_], skip_special_tokens=False).encode()
        return
    byte_of = {letter: byte for byte, letter in _byte_letters().items()}
    added = tokenizer.get_added_tokens_decoder()
    for id_ in ids:
        piece = tokenizer.id_to_token(id_) or ""
        is_name = id_ in added or not byte_of.keys() >= set(piece)
        yield piece.encode() if is_name else bytes(byte_of[letter] for letter in piece)


@cache
def _byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte (Radford et al. 2019).

    Printable bytes of Latin-1 are written as themselves, the others as letters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    codes = count(256)
    return {byte: chr(byte if byte in printable else next(codes)) for byte in range(256)}


def _disable_special_names(tokenizer: Tokenizer) -> Tokenizer:
    """Encode the name of a special id or an image code in a text as ordinary text."""
    tokenizer.encode_special_tokens = True
    names = names_in(tokenizer.get_vocab(with_added_tokens=True))
    # Files from elsewhere may list these names as ordinary added tokens.
    ordinary = [
        token.content
        for token in tokenizer.get_added_tokens_decoder().values()
        if not token.special
        and (token.content in names.special or names.code.fullmatch(token.content))
    ]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ordinary])
    return tokenizer
