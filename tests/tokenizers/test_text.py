"""Byte-level BPE: text round-trips, and no text becomes a special id."""

import json
import os
import random
import signal
from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from moma.errors import UserError
from moma.tokenizers.names import OURS
from moma.tokenizers.text import (
    TextTokenizerConfig,
    decode_bytes,
    decode_each,
    encode_bytes,
    encode_texts,
    load_text_tokenizer,
    split_text,
    train_text_tokenizer,
    vocabulary_of,
)
from tests.factories import text_tokenizer

CODES = 20
SIZE = 320
TEXTS = [
    "the red apple is left of the green rocket",
    "<s> the image </s> <image> <code:3> </image> <pad>",
    "äpfel und birnen",
] * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(TextTokenizerConfig(vocabulary_size=SIZE), TEXTS, CODES)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return vocabulary_of(tokenizer, codes_per_image=9)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")))
@example("<s></s><pad><image></image><code:0>")
@example(" \r\n\t  two  spaces \x00 e\u0301 \u00e9 \u200d \U0001f468\u200d\U0001f469 \ufeff")
def test_text_round_trips_without_special_ids(tokenizer, vocabulary, text):
    (ids,) = encode_texts(tokenizer, [text])
    assert decode(tokenizer, ids) == text
    assert not {vocabulary.beginning, vocabulary.end, vocabulary.padding} & set(ids)
    assert not {vocabulary.begin_image, vocabulary.end_image, *vocabulary.image_codes} & set(ids)
    assert all(0 <= id_ < vocabulary.size for id_ in ids)


@settings(deadline=None)
@given(st.binary())
@example(bytes(range(256)))
@example(b"caf\xe9 caf\xc3\xa9 \xed\xa0\x80 \xf0\x9f\x98")
@example("<s> \U0001f600 </s>".encode())
def test_bytes_round_trip(tokenizer, vocabulary, data):
    ids = encode_bytes(tokenizer, data)
    assert decode_bytes(tokenizer, ids) == data
    assert not {vocabulary.beginning, vocabulary.end, *vocabulary.image_codes} & set(ids)


def test_the_bytes_of_a_text_have_its_ids(tokenizer):
    assert [encode_bytes(tokenizer, text.encode()) for text in TEXTS] == list(
        encode_texts(tokenizer, TEXTS)
    )


def test_special_ids_are_decoded_to_their_names(tokenizer, vocabulary):
    ids = [vocabulary.beginning, *encode_bytes(tokenizer, b"a"), vocabulary.image_codes[7]]
    assert decode_bytes(tokenizer, ids) == b"<s>a<code:7>"


def test_a_token_of_other_letters_is_decoded_to_its_name():
    values = json.loads(text_tokenizer().to_str())
    values["model"]["vocab"]["\u2581word"] = 900
    tokenizer = Tokenizer.from_str(json.dumps(values))
    assert decode_bytes(tokenizer, [900]) == "\u2581word".encode()


@pytest.mark.parametrize("name", [*OURS.special, "<code:0>", "<code:19>"])
def test_the_name_of_a_special_id_is_ordinary_text(tokenizer, name):
    special = tokenizer.token_to_id(name)
    (ids,) = encode_texts(tokenizer, [f"a {name}{name} b"])
    assert special is not None and special not in ids
    assert decode(tokenizer, ids) == f"a {name}{name} b"


def test_texts_keep_their_order(tokenizer):
    texts = [f"number {index}" for index in range(50)]
    assert [decode(tokenizer, ids) for ids in encode_texts(tokenizer, texts)] == texts
    assert list(encode_texts(tokenizer, [])) == []


def test_merges_are_learned(tokenizer):
    # Without merges, every byte would be a token.
    (ids,) = encode_texts(tokenizer, [TEXTS[0]])
    assert len(ids) < len(TEXTS[0]) / 2


def test_the_vocabulary_has_the_size_of_the_recipe(tokenizer, vocabulary):
    assert vocabulary.size == tokenizer.get_vocab_size(with_added_tokens=True) == SIZE


def test_too_little_text_makes_a_smaller_vocabulary_without_gaps():
    tokenizer = train_text_tokenizer(TextTokenizerConfig(vocabulary_size=5000), ["a b"], CODES)
    vocabulary = vocabulary_of(tokenizer, 4)
    assert vocabulary.size < 5000
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocabulary.size))


def test_the_vocabulary_is_read_from_the_names(tokenizer, vocabulary):
    assert vocabulary.codes_per_image == 9
    assert len(set(vocabulary.image_codes)) == CODES
    for code, id_ in enumerate(vocabulary.image_codes):
        assert tokenizer.id_to_token(id_) == f"<code:{code}>"
    ids = (
        vocabulary.beginning,
        vocabulary.end,
        vocabulary.padding,
        vocabulary.begin_image,
        vocabulary.end_image,
    )
    assert tuple(map(tokenizer.id_to_token, ids)) == OURS.special


def test_training_is_deterministic(tokenizer):
    again = train_text_tokenizer(TextTokenizerConfig(vocabulary_size=SIZE), TEXTS, CODES)
    assert again.to_str() == tokenizer.to_str()


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, vocabulary, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    loaded = load_text_tokenizer(path)
    texts = [*TEXTS[:3], "<s> unseen ✓ <code:3>"]
    assert list(encode_texts(loaded, texts)) == list(encode_texts(tokenizer, texts))
    assert vocabulary_of(loaded, 9) == vocabulary


@pytest.mark.parametrize(("size", "codes"), [(300, 40), (350, 90)])
def test_a_vocabulary_that_is_too_small_is_refused_with_the_smallest_size(size, codes):
    config = TextTokenizerConfig(vocabulary_size=size)
    with pytest.raises(UserError, match=f"vocabulary_size = {size}.*at least {codes + 261}"):
        train_text_tokenizer(config, TEXTS, codes)


def test_the_smallest_vocabulary_works():
    config = TextTokenizerConfig(vocabulary_size=301)
    assert vocabulary_of(train_text_tokenizer(config, TEXTS, 40), 4).size == 301


def test_reserved_ids_are_named_and_unreachable():
    config = TextTokenizerConfig(vocabulary_size=SIZE, reserved=3)
    tokenizer = train_text_tokenizer(config, TEXTS, CODES)
    vocabulary = vocabulary_of(tokenizer, 9)
    reserved = [tokenizer.token_to_id(f"<reserved:{number}>") for number in range(3)]
    assert vocabulary.size == SIZE
    assert None not in reserved and not set(reserved) & set(vocabulary.image_codes)
    (ids,) = encode_texts(tokenizer, ["<reserved:0> <reserved:2>"])
    assert not set(ids) & set(reserved)


def test_ids_are_reserved_in_the_papers_vocabulary_and_not_in_a_small_one():
    assert len(TextTokenizerConfig().reserved_names) == 256
    assert TextTokenizerConfig(vocabulary_size=65_535).reserved_names == []
    assert TextTokenizerConfig(reserved=0).reserved_names == []


def test_transformers_reads_the_file_and_gives_the_same_ids(tokenizer, vocabulary, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), split_special_tokens=True
    )
    assert len(loaded) == vocabulary.size
    texts = [*TEXTS[:3], " \r\n\t  two  e\u0301 \U0001f468\u200d\U0001f469 \x00", "x<code:3>y"]
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids, clean_up_tokenization_spaces=False) == text
    assert loaded.convert_tokens_to_ids("<code:19>") == vocabulary.image_codes[19]


def test_an_error_in_the_texts_passes_through():
    def texts():
        yield "fine"
        raise UserError("row 2 is broken")

    with pytest.raises(UserError, match="row 2 is broken"):
        train_text_tokenizer(TextTokenizerConfig(vocabulary_size=SIZE), texts(), CODES)


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[", b"\xff", json.dumps({"a": 1}).encode()]
)
def test_a_file_that_is_not_a_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot read.*moma prepare"):
        load_text_tokenizer(path)


@given(st.lists(st.text(), max_size=8))
@settings(deadline=None, max_examples=200)
def test_fast_encoding_equals_encoding_with_offsets(tokenizer, texts):
    slow = tokenizer.encode_batch([*texts, *TEXTS], add_special_tokens=False)
    assert list(encode_texts(tokenizer, [*texts, *TEXTS])) == [encoding.ids for encoding in slow]


@pytest.fixture(scope="module")
def unbounded(tokenizer):
    """The same tokenizer with the library's words, of any length."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.encode_special_tokens = True
    return plain


@given(st.text(max_size=1000))
@settings(deadline=None, max_examples=300)
@example(" it's  we'll \t\n 12 a1! \u00a0 \u3000x" + " " * 1000)
def test_ordinary_text_has_the_ids_of_the_unbounded_pre_tokenizer(tokenizer, unbounded, text):
    text = text.encode("utf-8", "ignore").decode()
    assert list(encode_texts(tokenizer, [text])) == list(encode_texts(unbounded, [text]))


@pytest.mark.parametrize("letter", ["a", "\u00e4", "7", "=", " ", "\n", "\U0001f468"])
def test_long_words_are_split_and_round_trip(tokenizer, letter):
    text = f"x {letter * 30_000} y"
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert max(map(len, words)) <= 1025 * len(letter.encode())
    (ids,) = encode_texts(tokenizer, [text])
    assert decode(tokenizer, ids) == text
    assert b"".join(decode_each(tokenizer, ids)) == text.encode()


@given(st.text(max_size=200), st.integers(8, 40))
@settings(deadline=None, max_examples=300)
@example(" it's  we'll \t\n 12 a1! \u00a0 \u3000x y" + " " * 100, 9)
@example("a" * 3000 + "  " + "b" * 3000, 1100)
@example("don't d'on'll 's" * 10, 13)
@pytest.mark.parametrize("words_of", ["trained", "from elsewhere"])
def test_the_pieces_of_a_text_have_its_ids(tokenizer, unbounded, words_of, text, size):
    tokenizer = tokenizer if words_of == "trained" else unbounded
    text = text.encode("utf-8", "ignore").decode()
    words = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    size = max([size, *(end - start + 2 for _, (start, end) in words)])  # longer than any word
    pieces = split_text(tokenizer, text, size)
    assert "".join(pieces) == text and all(0 < len(piece) <= size for piece in pieces[:-1])
    (whole,) = encode_texts(tokenizer, [text])
    assert list(chain.from_iterable(encode_texts(tokenizer, pieces))) == whole


def test_texts_are_cut_only_where_words_are_known_to_end(tokenizer, unbounded):
    text = "a b " * 100
    assert len(split_text(Tokenizer.from_str(tokenizer.to_str()), text, 20)) > 10
    assert len(split_text(unbounded, text, 20)) > 10
    spaced = Tokenizer.from_str(unbounded.to_str())
    spaced.normalizer = normalizers.Prepend("_")  # each piece would get its own
    without_words = Tokenizer(unbounded.model)
    for other in (spaced, without_words):
        assert split_text(other, text, 20) == [text]


def test_a_long_word_of_a_tokenizer_from_elsewhere_is_cut(unbounded):
    pieces = split_text(unbounded, "x " + "y" * 1000 + " z z", 100)
    assert [len(piece) for piece in pieces] == [1, *[100] * 10, 5]


def test_a_word_of_200_000_letters_trains():
    """Without a limit for words, the time would grow with the square of its length."""
    text = "".join(random.Random(0).choices("ACGT", k=200_000))
    tokenizer = train_text_tokenizer(TextTokenizerConfig(vocabulary_size=SIZE), [text], CODES)
    (ids,) = encode_texts(tokenizer, [text])
    assert len(ids) < len(text) / 2 and decode(tokenizer, ids) == text


@pytest.fixture
def interruptible():
    """Python's handler of SIGINT, which is missing in a process started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_progress_is_reported_and_ctrl_c_ends_training():
    seen = []

    def progress(done, note=""):
        seen.append((done, note))
        if "merges" in note:
            os.kill(os.getpid(), signal.SIGINT)

    texts = ["".join(random.Random(n).choices("ACGT", k=400)) for n in range(1000)]
    with pytest.raises(KeyboardInterrupt):
        train_text_tokenizer(TextTokenizerConfig(), texts, CODES, progress)
    assert seen == [(256, "texts"), (512, "texts"), (768, "texts"), (1000, seen[-1][1])]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_texts_are_read_ends_training():
    def texts():
        yield from TEXTS
        os.kill(os.getpid(), signal.SIGINT)
        yield from TEXTS * 1000

    with pytest.raises(KeyboardInterrupt):
        train_text_tokenizer(TextTokenizerConfig(vocabulary_size=SIZE), texts(), CODES)
