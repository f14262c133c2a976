"""Byte-level BPE: nothing of a text is lost, and no text becomes a special id."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moma.errors import UserError
from moma.tokenizers.text import (
    SPECIAL_NAMES,
    TextTokenizerConfig,
    encode_texts,
    load_text_tokenizer,
    train_text_tokenizer,
    vocabulary_of,
)

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
def test_every_text_comes_back_and_none_becomes_special(tokenizer, vocabulary, text):
    (ids,) = encode_texts(tokenizer, [text])
    assert decode(tokenizer, ids) == text
    assert not {vocabulary.beginning, vocabulary.end, vocabulary.padding} & set(ids)
    assert not {vocabulary.begin_image, vocabulary.end_image, *vocabulary.image_codes} & set(ids)
    assert all(0 <= id_ < vocabulary.size for id_ in ids)


@pytest.mark.parametrize("name", [*SPECIAL_NAMES, "<code:0>", "<code:19>"])
def test_the_name_of_a_special_id_is_ordinary_text(tokenizer, name):
    special = tokenizer.token_to_id(name)
    (ids,) = encode_texts(tokenizer, [f"a {name}{name} b"])
    assert special is not None and special not in ids
    assert decode(tokenizer, ids) == f"a {name}{name} b"


def test_texts_keep_their_order(tokenizer):
    texts = [f"number {index}" for index in range(50)]
    assert [decode(tokenizer, ids) for ids in encode_texts(tokenizer, texts)] == texts
    assert encode_texts(tokenizer, []) == []


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


def test_the_vocabulary_is_read_off_the_names(tokenizer, vocabulary):
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
    assert tuple(map(tokenizer.id_to_token, ids)) == SPECIAL_NAMES


def test_training_is_deterministic(tokenizer):
    again = train_text_tokenizer(TextTokenizerConfig(vocabulary_size=SIZE), TEXTS, CODES)
    assert again.to_str() == tokenizer.to_str()


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, vocabulary, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    loaded = load_text_tokenizer(path)
    texts = [*TEXTS[:3], "<s> unseen ✓ <code:3>"]
    assert encode_texts(loaded, texts) == encode_texts(tokenizer, texts)
    assert vocabulary_of(loaded, 9) == vocabulary


@pytest.mark.parametrize(("size", "codes"), [(300, 40), (350, 90)])
def test_a_vocabulary_without_room_says_how_much_is_needed(size, codes):
    config = TextTokenizerConfig(vocabulary_size=size)
    with pytest.raises(UserError, match=f"vocabulary_size = {size}.*at least {codes + 261}"):
        train_text_tokenizer(config, TEXTS, codes)


def test_the_smallest_vocabulary_that_is_promised_works():
    config = TextTokenizerConfig(vocabulary_size=301)
    assert vocabulary_of(train_text_tokenizer(config, TEXTS, 40), 4).size == 301


def test_an_error_in_the_texts_passes_through():
    def texts():
        yield "fine"
        raise UserError("row 2 is broken")

    with pytest.raises(UserError, match="row 2 is broken"):
        train_text_tokenizer(TextTokenizerConfig(vocabulary_size=SIZE), texts(), CODES)


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[", b"\xff", json.dumps({"a": 1}).encode()]
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot read.*moma prepare"):
        load_text_tokenizer(path)
