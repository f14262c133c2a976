"""Whatever a model wants to write: images are whole, and only where the mode allows them."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moma.generate.grammar import Grammar
from moma.vocabulary import Vocabulary

CODES = 4
VOCABULARY = Vocabulary(
    size=30,
    beginning=7,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=(29, 12, 13, 5, 20),
    codes_per_image=CODES,
)
WORDS = set(range(30)) - {7, 1, 2, 3, 4, *VOCABULARY.image_codes}
IMAGE = VOCABULARY.wrap_image(np.array([0, 1, 2, 3]))


def allowed(grammar):
    return set(grammar.allowed().nonzero()[0].tolist())


def write(grammar, wishes, most=200):
    """The answer of a model that wants `wishes` (numbers), each turned into an allowed id."""
    answer: list[int] = []
    for wish in wishes:
        if len(answer) == most:
            break
        choices = sorted(allowed(grammar))
        assert choices, "a sequence must always be able to go on"
        answer.append(choices[wish % len(choices)])
        grammar.advance(answer[-1])
        if grammar.ends_with(answer[-1]):
            break
    return answer


def images_in(tokens):
    """Codes of every image by a plain scan; fails on codes outside and on broken images."""
    images: list[list[int]] = []
    inside: list[int] | None = None
    for token in tokens:
        if token == VOCABULARY.begin_image:
            assert inside is None
            inside = []
        elif token == VOCABULARY.end_image:
            assert inside is not None and len(inside) == CODES
            images.append(inside)
            inside = None
        elif inside is not None:
            assert token in VOCABULARY.image_codes and len(inside) < CODES
            inside.append(token)
        else:
            assert token not in VOCABULARY.image_codes
    return images, inside


WISHES = st.lists(st.integers(0, 10**6), max_size=60)
PROMPTS = st.sampled_from([[7], [7, 10, 11], [7, *IMAGE], [7, 10, *IMAGE, 11, *IMAGE]])


@settings(deadline=None)
@given(WISHES, PROMPTS, st.sampled_from(["text", "image", "mixed"]))
@example([1] * 60, [7], "mixed")
def test_images_are_whole_whatever_the_model_wants(wishes, prompt, mode):
    grammar = Grammar(VOCABULARY, mode)
    for token in prompt:
        grammar.advance(token)
    answer = write(grammar, wishes)
    images_in(answer)
    assert not {VOCABULARY.beginning, VOCABULARY.padding} & set(answer)


@settings(deadline=None)
@given(WISHES, PROMPTS)
def test_text_mode_writes_words_alone(wishes, prompt):
    grammar = Grammar(VOCABULARY, "text")
    for token in prompt:
        grammar.advance(token)
    answer = write(grammar, wishes)
    assert set(answer[:-1]) <= WORDS
    assert set(answer[-1:]) <= WORDS | {VOCABULARY.end}


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=CODES + 2, max_size=60), PROMPTS)
def test_image_mode_writes_one_image_and_ends(wishes, prompt):
    grammar = Grammar(VOCABULARY, "image")
    for token in prompt:
        grammar.advance(token)
    answer = write(grammar, wishes)
    assert len(answer) == VOCABULARY.image_span
    ((codes,), left) = images_in(answer)
    assert len(codes) == CODES and left is None


def test_mixed_mode_offers_words_the_end_and_an_image():
    grammar = Grammar(VOCABULARY, "mixed")
    assert allowed(grammar) == WORDS | {VOCABULARY.end, VOCABULARY.begin_image}
    grammar.advance(10)
    assert allowed(grammar) == WORDS | {VOCABULARY.end, VOCABULARY.begin_image}


def test_text_mode_offers_words_and_the_end():
    assert allowed(Grammar(VOCABULARY, "text")) == WORDS | {VOCABULARY.end}


def test_image_mode_offers_the_image_alone():
    assert allowed(Grammar(VOCABULARY, "image")) == {VOCABULARY.begin_image}


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
def test_inside_an_image_there_are_codes_then_its_end(mode):
    grammar = Grammar(VOCABULARY, mode)
    grammar.advance(VOCABULARY.begin_image)
    for _ in range(CODES):
        assert allowed(grammar) == set(VOCABULARY.image_codes)
        grammar.advance(5)
    assert allowed(grammar) == {VOCABULARY.end_image}
    grammar.advance(VOCABULARY.end_image)
    assert allowed(grammar) == allowed(Grammar(VOCABULARY, mode))


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
def test_a_prompt_that_stops_inside_an_image_is_finished_first(mode):
    grammar = Grammar(VOCABULARY, mode)
    for token in [7, 10, *IMAGE[:3]]:
        grammar.advance(token)
    answer = write(grammar, [0] * (CODES - 1))
    assert len(answer) == CODES - 1 and answer[-1] == VOCABULARY.end_image
    assert images_in([*IMAGE[:3], *answer])[1] is None


@pytest.mark.parametrize(("mode", "last"), [("text", 1), ("mixed", 1), ("image", 4)])
def test_an_answer_ends_with_the_document_or_with_the_image(mode, last):
    grammar = Grammar(VOCABULARY, mode)
    assert [id_ for id_ in range(30) if grammar.ends_with(id_)] == [last]
