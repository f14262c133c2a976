"""A tokenizer file with Chameleon's names: ids by name, in any order, unreachable from text."""

import pytest
from tokenizers import Tokenizer

from moma.errors import UserError
from moma.tokenizers.names import CHAMELEON, OURS, names_in, read_vocabulary
from moma.tokenizers.text import (
    TextTokenizerConfig,
    encode_texts,
    load_text_tokenizer,
    train_text_tokenizer,
    vocabulary_of,
)
from tests.hub.foreign import CODES, chameleon_code, chameleon_file


@pytest.fixture(params=[(True, True), (False, True), (False, False)], ids=str)
def tokenizer(request, tmp_path):
    path = tmp_path / "text_tokenizer.json"
    path.write_text(chameleon_file(*request.param))
    return load_text_tokenizer(path)


def test_ids_come_from_the_file_by_name(tokenizer):
    vocabulary = vocabulary_of(tokenizer, codes_per_image=4)
    assert (vocabulary.beginning, vocabulary.end, vocabulary.padding) == (0, 2, 1)
    assert (vocabulary.begin_image, vocabulary.end_image) == (800, 801)
    assert vocabulary.size == 803
    assert len(vocabulary.image_codes) == CODES
    for code, id_ in enumerate(vocabulary.image_codes):
        assert tokenizer.id_to_token(id_) == chameleon_code(code)
        assert vocabulary.code_of_id[id_] == code
    # These ids have no name.
    assert (vocabulary.code_of_id[400:500] == -1).all()


def test_no_text_becomes_a_special_id_or_a_code(tokenizer):
    vocabulary = vocabulary_of(tokenizer, 4)
    forbidden = {800, 801, 0, 1, 2, *vocabulary.image_codes}
    texts = [
        f"{chameleon_code(0)} a{chameleon_code(12)}{chameleon_code(204)}",
        "<s> </s> <pad> <racm3:break><eoss>",
    ]
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert not forbidden & set(ids)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_names_of_the_codes_decide_which_names_a_file_uses():
    ours = train_text_tokenizer(TextTokenizerConfig(vocabulary_size=300), ["a"], 5)
    assert names_in(ours.get_vocab()) is OURS
    theirs = Tokenizer.from_str(chameleon_file(as_words=True, special=True))
    assert names_in(theirs.get_vocab()) is CHAMELEON


def test_digits_of_chameleons_codes_are_letters():
    ids = {chameleon_code(code): code + 1000 for code in range(3000)}
    assert "IMGIMGCAFZ" in ids
    assert CHAMELEON.codes(ids) == [code + 1000 for code in range(3000)]


def test_missing_names_and_impossible_ids_are_refused():
    ids = {name: number for number, name in enumerate(OURS.special)}
    with pytest.raises(UserError, match="no id for <image>, </image>"):
        read_vocabulary({"<s>": 0, "</s>": 1, "<pad>": 2}, 4)
    with pytest.raises(UserError, match="look at code 2"):
        read_vocabulary(ids | {"<code:0>": 7, "<code:2>": 8}, 4)
    with pytest.raises(UserError, match="an id has two meanings"):
        read_vocabulary(ids | {"<code:0>": 7, "<code:1>": 7}, 4)
    with pytest.raises(UserError, match="size ≤ 16777216"):
        read_vocabulary(ids | {"<code:0>": 7, "far": 2**32 - 1}, 4)
    with pytest.raises(UserError, match="look at code 1"):
        read_vocabulary(ids | {"<code:0>": 7, "<code:1>": 8, "<code:01>": 9}, 4)
