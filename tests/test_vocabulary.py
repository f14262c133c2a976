"""Modalities of ids, and storage and comparison of vocabularies."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.errors import UserError
from moma.vocabulary import IMAGE, TEXT, Vocabulary
from tests.factories import make_vocabulary

# The ids of codes are neither adjacent nor in the order of the codebook.
VOCABULARY = make_vocabulary(size=20, beginning=7, codes=(19, 5, 11, 6), codes_per_image=3)
VALUES = asdict(VOCABULARY)


def test_image_codes_are_images_and_other_ids_text():
    for id_ in range(VOCABULARY.size):
        expected = IMAGE if id_ in VOCABULARY.image_codes else TEXT
        assert VOCABULARY.modality_of_id[id_] == expected
    assert VOCABULARY.modality_of_id.shape == (20,)


def test_boundaries_of_images_count_as_text():
    assert VOCABULARY.modality_of_id[VOCABULARY.begin_image] == TEXT
    assert VOCABULARY.modality_of_id[VOCABULARY.end_image] == TEXT


def test_code_of_id_is_the_inverse_of_image_codes():
    for id_ in range(VOCABULARY.size):
        codes = VOCABULARY.image_codes
        expected = codes.index(id_) if id_ in codes else -1
        assert VOCABULARY.code_of_id[id_] == expected


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_the_codes_of_a_wrapped_image_are_preserved(codes):
    ids = VOCABULARY.wrap_image(np.array(codes))
    assert len(ids) == VOCABULARY.image_span
    assert (ids[0], ids[-1]) == (VOCABULARY.begin_image, VOCABULARY.end_image)
    assert VOCABULARY.code_of_id[ids[1:-1]].tolist() == codes


def test_a_grid_of_codes_is_wrapped_row_by_row():
    wide = replace(VOCABULARY, codes_per_image=4)
    assert wide.wrap_image(np.array([[0, 1], [2, 3]])) == [3, 19, 5, 11, 6, 4]


def test_a_loaded_vocabulary_equals_the_saved_one(tmp_path):
    VOCABULARY.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == VOCABULARY
    assert loaded.fingerprint == VOCABULARY.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"size": 21},
        {"beginning": 8},
        {"end": 8},
        {"padding": 8},
        {"begin_image": 8},
        {"end_image": 8},
        {"image_codes": (5, 19, 11, 6)},
        {"codes_per_image": 4},
    ],
)
def test_every_field_changes_the_fingerprint_and_the_differences(change):
    other = replace(VOCABULARY, **change)
    assert other.fingerprint != VOCABULARY.fingerprint
    (key,) = change
    assert VOCABULARY.differences(other).startswith(f"{key} (")
    assert ", " not in VOCABULARY.differences(other)


def test_equal_vocabularies_have_no_differences():
    same = replace(VOCABULARY)
    assert same.fingerprint == VOCABULARY.fingerprint
    assert VOCABULARY.differences(same) == ""


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\xff",
        b"[]",
        b"3",
        b'{"size": 3}',
        json.dumps({"image_codes": 3}).encode(),
        json.dumps({"image_codes": [], "color": 3}).encode(),
        *(
            json.dumps(VALUES | change).encode()
            for change in (
                {"size": 2**40},
                {"size": 19},
                {"beginning": -1},
                {"beginning": 1.5},
                {"end": VALUES["padding"]},
                {"image_codes": [5, 5]},
                {"codes_per_image": 0},
                {"codes_per_image": 2**40},
            )
        ),
    ],
)
def test_an_invalid_vocabulary_file_is_named(tmp_path, content):
    path = tmp_path / "vocabulary.json"
    if content is not None:
        path.write_bytes(content)
    message = r"vocabulary\.json: not a vocabulary.*moma prepare"
    if content is None:
        message = r"not prepared yet; run `moma prepare`"
    with pytest.raises(UserError, match=message):
        Vocabulary.load(path)
