"""For any choices of a model, images are complete and only where the mode allows them."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moma.generate.grammar import Grammar
from tests.factories import make_vocabulary
from tests.generate.allowed import allowed_ids

CODES = 4
VOCABULARY = make_vocabulary(30, (29, 12, 13, 5, 20), CODES, beginning=7)
WORDS = set(range(30)) - {7, 1, 2, 3, 4, *VOCABULARY.image_codes}
IMAGE = VOCABULARY.wrap_image(np.array([0, 1, 2, 3]))


def generate(grammar, choices):
    """Return a continuation; each choice is a number that selects one of the allowed ids."""
    continuation: list[int] = []
    for choice in choices:
        ids = sorted(allowed_ids(grammar))
        assert ids, "some id must always be allowed"
        continuation.append(ids[choice % len(ids)])
        grammar.advance(continuation[-1])
        if grammar.ends_with(continuation[-1]):
            break
    return continuation


def images_in(tokens):
    """Return the codes of every image; fails on codes outside and on incomplete images."""
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


CHOICES = st.lists(st.integers(0, 10**6), max_size=60)
PROMPTS = st.sampled_from([[7], [7, 10, 11], [7, *IMAGE], [7, 10, *IMAGE, 11, *IMAGE]])


@settings(deadline=None)
@given(CHOICES, PROMPTS, st.sampled_from(["text", "image", "mixed"]))
@example([1] * 60, [7], "mixed")
def test_images_are_complete_for_any_choices(choices, prompt, mode):
    grammar = Grammar(VOCABULARY, mode)
    for token in prompt:
        grammar.advance(token)
    continuation = generate(grammar, choices)
    images_in(continuation)
    assert not {VOCABULARY.beginning, VOCABULARY.padding} & set(continuation)


@settings(deadline=None)
@given(CHOICES, PROMPTS)
def test_text_mode_generates_only_words(choices, prompt):
    grammar = Grammar(VOCABULARY, "text")
    for token in prompt:
        grammar.advance(token)
    continuation = generate(grammar, choices)
    assert set(continuation[:-1]) <= WORDS
    assert set(continuation[-1:]) <= WORDS | {VOCABULARY.end}


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=CODES + 2, max_size=60), PROMPTS)
def test_image_mode_generates_one_image_and_ends(choices, prompt):
    grammar = Grammar(VOCABULARY, "image")
    for token in prompt:
        grammar.advance(token)
    continuation = generate(grammar, choices)
    assert len(continuation) == VOCABULARY.image_span
    ((codes,), unfinished) = images_in(continuation)
    assert len(codes) == CODES and unfinished is None


def test_mixed_mode_allows_words_the_end_and_an_image():
    grammar = Grammar(VOCABULARY, "mixed")
    assert allowed_ids(grammar) == WORDS | {VOCABULARY.end, VOCABULARY.begin_image}
    grammar.advance(10)
    assert allowed_ids(grammar) == WORDS | {VOCABULARY.end, VOCABULARY.begin_image}


def test_an_image_begins_only_if_it_fits_and_only_in_mixed_mode():
    grammar, span = Grammar(VOCABULARY, "mixed"), VOCABULARY.image_span
    found = [grammar.allowed(remaining).begin_image for remaining in (span - 1, span, None)]
    assert found == [False, True, True]
    assert not Grammar(VOCABULARY, "text").allowed(span).begin_image


def test_text_mode_allows_words_and_the_end():
    assert allowed_ids(Grammar(VOCABULARY, "text")) == WORDS | {VOCABULARY.end}


def test_image_mode_allows_only_an_image():
    assert allowed_ids(Grammar(VOCABULARY, "image")) == {VOCABULARY.begin_image}


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
def test_inside_an_image_codes_are_allowed_and_then_its_end(mode):
    grammar = Grammar(VOCABULARY, mode)
    grammar.advance(VOCABULARY.begin_image)
    for _ in range(CODES):
        assert allowed_ids(grammar) == set(VOCABULARY.image_codes)
        grammar.advance(5)
    assert allowed_ids(grammar) == {VOCABULARY.end_image}
    grammar.advance(VOCABULARY.end_image)
    assert allowed_ids(grammar) == allowed_ids(Grammar(VOCABULARY, mode))


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
def test_an_image_that_the_prompt_begins_is_completed(mode):
    grammar = Grammar(VOCABULARY, mode)
    for token in [7, 10, *IMAGE[:3]]:
        grammar.advance(token)
    continuation = generate(grammar, [0] * (CODES - 1))
    assert len(continuation) == CODES - 1 and continuation[-1] == VOCABULARY.end_image
    assert images_in([*IMAGE[:3], *continuation])[1] is None


@pytest.mark.parametrize(("mode", "last"), [("text", 1), ("mixed", 1), ("image", 4)])
def test_a_continuation_ends_with_the_document_or_the_image(mode, last):
    grammar = Grammar(VOCABULARY, mode)
    assert [id_ for id_ in range(30) if grammar.ends_with(id_)] == [last]
