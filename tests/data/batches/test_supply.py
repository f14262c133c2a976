"""Recipes that their documents cannot feed: refused with the numbers, and the advice holds."""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moma.data.batches.packing import EncodedDocument, Packer
from moma.data.batches.supply import Demand, ImageDocuments, _Text, check_supply
from moma.errors import UserError
from moma.vocabulary import Vocabulary

CODES = 16
VOCABULARY = Vocabulary(
    size=30,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=6,
    image_codes=(4,),
    codes_per_image=CODES,
)


class Documents:
    """Documents of which only lengths are asked for."""

    def __init__(self, texts_and_images):
        self.texts = [text for text, _ in texts_and_images]
        self.images = np.array([images for _, images in texts_and_images])

    def ids(self, row):
        return np.zeros(self.texts[row] + self.images[row] * (CODES + 2))


def with_images(*texts_and_images, name="a", weight=1.0):
    rows = np.arange(len(texts_and_images))
    return ImageDocuments(name, weight, Documents(texts_and_images), rows)


def demand(images, micro_batch_size=4, sequence_length=100, max_padding=0.005, world_size=1):
    return Demand(micro_batch_size, sequence_length, images, CODES, max_padding, world_size)


def refusal(wanted, documents, has_text=True):
    with pytest.raises(UserError) as caught:
        check_supply(wanted, documents, has_text, "a, b")
    return str(caught.value)


def test_enough_of_both_is_accepted():
    check_supply(demand(8), [with_images(*[(20, 1)] * 30)], True, "a")
    check_supply(demand(8), [with_images(*[(32, 1)] * 30)], False, "a")  # exactly full
    check_supply(demand(0), [], True, "a")


def test_no_images_and_no_text():
    assert "no document of a, b has an image; add a source of im" in refusal(demand(8), [])
    assert "every document of a, b has an image" in refusal(demand(0), [with_images((5, 1))], False)


def test_too_few_images_for_a_step():
    message = refusal(demand(8, world_size=2), [with_images(*[(20, 3)] * 5)])
    assert "16 in all, but the training documents" in message and "hold 15 in all" in message
    check_supply(demand(8, world_size=1), [with_images(*[(20, 3)] * 5)], True, "a")


def test_too_much_text_beside_images():
    message = refusal(demand(8), [with_images(*[(40, 1)] * 30)])
    assert "bring 40 text tokens with each image" in message
    assert "8 images in 4 sequences of 100 leave room for 32" in message
    assert "lower image_share to 0.24 (6 images)" in message


def test_too_little_text_beside_images():
    message = refusal(demand(8), [with_images(*[(10, 1)] * 30)], has_text=False)
    assert "bring 10 text tokens" in message and "room for 32" in message
    assert "44.00% of the positions would be padding" in message
    assert "allows 0.50%" in message and "add a source of text" in message
    assert "raise image_share to 0.56 (14 images), which leaves 2.00%" in message
    check_supply(demand(8, max_padding=0.45), [with_images(*[(10, 1)] * 30)], False, "a")


def test_weights_and_images_of_a_document_count():
    """32 tokens an image: 3 · (14 + …) of one source and 1 · … of the other."""
    often = with_images(*[(28, 2)] * 30, weight=3.0)
    seldom = with_images(*[(200, 1)] * 30, name="b")
    # (3 · 28 + 200) / (3 · 2 + 1) = 40.57
    assert "bring 40.5714 text tokens" in refusal(demand(8), [often, seldom])


@given(
    st.lists(st.tuples(st.integers(2, 300), st.integers(1, 4)), min_size=20, max_size=40),
    st.integers(1, 20),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_the_advice_is_accepted(documents, images, has_text):
    """Whoever takes the proposed image_share is not refused again for too much text."""
    assume(images <= 4 * (100 // (CODES + 2)))
    source = [with_images(*documents)]
    try:
        check_supply(demand(images), source, has_text, "a")
        return
    except UserError as error:
        found = re.search(r"image_share to [\d.]+ \((\d+) images\)", str(error))
        too_much = "leave room for" in str(error) and "padding" not in str(error)
    if found:
        check_supply(demand(int(found[1]), max_padding=1.0), source, has_text, "a")
    else:
        text, count = map(sum, zip(*documents, strict=True))
        needed = text / count + CODES + 2
        assert not too_much or needed > 400


def test_what_may_be_missing_at_first_counts():
    """Texts of one length need 0.16% beyond the average, those that differ need more."""
    alike, differing = ([(text, 1) for text in texts] * 900 for texts in ((31, 31), (21, 41)))
    check_supply(demand(8, max_padding=0.023), [with_images(*alike)], False, "a")
    message = refusal(demand(8, max_padding=0.023), [with_images(*differing)], has_text=False)
    assert "2.00% of the positions would be padding" in message
    assert "of the first 300 micro-batches up to 0.69% more" in message
    check_supply(demand(8, max_padding=0.027), [with_images(*differing)], False, "a")


@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(1, 3)), min_size=1, max_size=12),
    st.sampled_from([40, 400]),
    st.integers(1, 3),
    st.integers(4, 12),
    st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_what_is_accepted_keeps_padding_within_the_limit(kinds, count, rows, images, seed):
    """The packer's first 300 micro-batches, with the least limit that is accepted."""
    source = with_images(*(kinds * (count // len(kinds) + 1)))
    documents = source.documents
    text = sum(documents.texts) / documents.images.sum()
    sequence_length = math.ceil(images * (text + CODES + 2) * 1.001 / rows)
    assume(rows * (sequence_length // (CODES + 2)) >= images)
    bare = demand(images, rows, sequence_length)
    found = _Text.of([source], bare)
    limit = bare.padding(images, found.beside) + found.padding_at_first(bare, images)
    wanted = demand(images, rows, sequence_length, max_padding=limit * 1.0001)
    check_supply(wanted, [source], False, "a")
    packer = Packer(rows, sequence_length, images, VOCABULARY, shuffled(documents, seed), iter([]))
    padding = 0
    for _ in range(300):
        try:
            padding += packer.pack().padding
        except UserError:  # text of some documents is longer than any row has room for
            return
    assert padding <= wanted.max_padding * 300 * wanted.size


def shuffled(documents, seed):
    """The documents epoch after epoch, each image with a part of the text before it."""
    draw = np.random.default_rng(seed)
    while True:
        for row in draw.permutation(len(documents.texts)):
            words, image = [5], [3, *[4] * CODES, 6]
            places = int(documents.images[row]) + 1
            before = draw.multinomial(documents.texts[row], [1 / places] * places)
            parts = [words * before[0]]
            for text in before[1:]:
                parts += [image, words * text]
            yield EncodedDocument("a", int(row), np.array([id_ for part in parts for id_ in part]))
