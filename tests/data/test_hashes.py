"""Hashes as numbers: what they are may never change, since splits follow from them."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from moma.data.documents import unit_hash, unit_hashes


def slowly(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56


@given(st.lists(st.text()))
def test_hashes_of_many_equal_those_of_each(texts):
    expected = [slowly(text) for text in texts]
    assert unit_hashes(texts).tolist() == expected
    assert [unit_hash(text) for text in texts] == expected
    assert all(0 <= one <= 1 for one in expected)


def test_a_known_value():
    assert unit_hash("held out: 1.png") == slowly("held out: 1.png") == 0.6062176333885472
