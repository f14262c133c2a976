"""Recipes that their documents cannot feed: refused with the numbers, and the advice holds."""

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moma.data.supply import Demand, Pictured, check_supply
from moma.errors import UserError

CODES = 16


class Documents:
    """Documents of which only lengths are asked for."""

    def __init__(self, texts_and_pictures):
        self.texts = [text for text, _ in texts_and_pictures]
        self.pictures = np.array([pictures for _, pictures in texts_and_pictures])

    def ids(self, row):
        return np.zeros(self.texts[row] + self.pictures[row] * (CODES + 2))


def pictured(*texts_and_pictures, name="a", weight=1.0):
    rows = np.arange(len(texts_and_pictures))
    return Pictured(name, weight, Documents(texts_and_pictures), rows)


def demand(pictures, rows=4, row_length=100, most_padding=0.005, world_size=1):
    return Demand(rows, row_length, pictures, CODES, most_padding, world_size)


def refusal(wanted, documents, has_text=True):
    with pytest.raises(UserError) as caught:
        check_supply(wanted, documents, has_text, "a, b")
    return str(caught.value)


def test_enough_of_both_is_accepted():
    check_supply(demand(8), [pictured(*[(20, 1)] * 30)], True, "a")
    check_supply(demand(8), [pictured(*[(32, 1)] * 30)], False, "a")  # exactly full
    check_supply(demand(0), [], True, "a")


def test_no_pictures_and_no_text():
    assert "no document of a, b has a picture; add a source of pic" in refusal(demand(8), [])
    assert "every document of a, b has a picture" in refusal(demand(0), [pictured((5, 1))], False)


def test_too_few_pictures_for_a_step():
    message = refusal(demand(8, world_size=2), [pictured(*[(20, 3)] * 5)])
    assert "16 in all, but the training documents" in message and "hold 15 in all" in message
    check_supply(demand(8, world_size=1), [pictured(*[(20, 3)] * 5)], True, "a")


def test_too_much_text_beside_pictures():
    message = refusal(demand(8), [pictured(*[(40, 1)] * 30)])
    assert "bring 40 text tokens with each picture" in message
    assert "8 pictures in 4 rows of 100 leave room for 32" in message
    assert "lower picture_share to 0.24 (6 pictures)" in message


def test_too_little_text_beside_pictures():
    message = refusal(demand(8), [pictured(*[(10, 1)] * 30)], has_text=False)
    assert "bring 10 text tokens" in message and "room for 32" in message
    assert "44.00% of the positions would be padding" in message
    assert "allows 0.50%" in message and "add a source of text" in message
    assert "raise picture_share to 0.56 (14 pictures), which leaves 2.00%" in message
    check_supply(demand(8, most_padding=0.45), [pictured(*[(10, 1)] * 30)], False, "a")


def test_weights_and_pictures_of_a_document_count():
    """32 tokens a picture: 3 · (14 + …) of one source and 1 · … of the other."""
    often = pictured(*[(28, 2)] * 30, weight=3.0)
    seldom = pictured(*[(200, 1)] * 30, name="b")
    # (3 · 28 + 200) / (3 · 2 + 1) = 40.57
    assert "bring 40.5714 text tokens" in refusal(demand(8), [often, seldom])


@given(
    st.lists(st.tuples(st.integers(2, 300), st.integers(1, 4)), min_size=20, max_size=40),
    st.integers(1, 20),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_the_advice_is_accepted(documents, pictures, has_text):
    """Whoever takes the proposed picture_share is not refused again for too much text."""
    assume(pictures <= 4 * (100 // (CODES + 2)))
    source = [pictured(*documents)]
    try:
        check_supply(demand(pictures), source, has_text, "a")
        return
    except UserError as error:
        found = re.search(r"picture_share to [\d.]+ \((\d+) pictures\)", str(error))
        too_much = "leave room for" in str(error) and "padding" not in str(error)
    if found:
        check_supply(demand(int(found[1]), most_padding=1.0), source, has_text, "a")
    else:
        text, count = map(sum, zip(*documents, strict=True))
        needed = text / count + CODES + 2
        assert not too_much or needed > 400
