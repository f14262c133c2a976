"""Recipes whose documents cannot meet the image budget are refused; the advice is right."""

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moma.data.batches.budget import (
    Budget,
    ImageDocuments,
    check_documents,
    check_packing,
)
from moma.data.batches.packing import EncodedDocument, Packer
from moma.data.config import DataConfig
from moma.errors import UserError
from moma.recipe import check
from tests.factories import make_vocabulary

CODES = 16
SPAN = CODES + 2
VOCABULARY = make_vocabulary(30, codes=[5], codes_per_image=CODES)


def budget_of(images, micro_batch_size=4, sequence_length=100):
    return Budget(images, micro_batch_size, sequence_length, CODES, SPAN)


def config_of(share, micro_batch_size=3, sequence_length=60):
    fields = {"path": "data", "sources": [{"kind": "text", "name": "a", "path": "unused"}]}
    sizes = {"micro_batch_size": micro_batch_size, "sequence_length": sequence_length}
    return check(DataConfig, {**fields, **sizes, "image_share": share}, "test")


def with_images(*texts_and_images, weight=1.0):
    """Documents of (text tokens, images)."""
    texts, images = np.array(texts_and_images).T
    return ImageDocuments(weight, texts + images * SPAN, images)


def refusal(budget, documents, has_text=True, world_size=1):
    with pytest.raises(UserError) as caught:
        check_documents(budget, documents, has_text, "a, b", world_size)
    return str(caught.value)


def accept(budget, documents, has_text=True, world_size=1):
    return check_documents(budget, documents, has_text, "a, b", world_size)


def shuffled(kinds, seed=0):
    """Documents of (text tokens, images), epoch after epoch; text stands anywhere."""
    random = np.random.default_rng(seed)
    while True:
        for row in random.permutation(len(kinds)):
            text, images = kinds[row]
            before = random.multinomial(text, [1 / (images + 1)] * (images + 1))
            image = [3, *[5] * CODES, 4]
            ids = [6] * before[0]
            for tokens in before[1:]:
                ids += [*image, *[6] * tokens]
            yield EncodedDocument("a", int(row), np.array(ids))


def packer_of(budget, kinds, text=(), seed=0):
    sizes = budget.micro_batch_size, budget.sequence_length, budget.images
    return Packer(*sizes, VOCABULARY, shuffled(kinds, seed), iter(text))


def test_a_budget_is_a_whole_number_of_images():
    assert Budget.from_config(config_of(0.8), VOCABULARY) == (9, 3, 60, CODES, SPAN)
    assert Budget.from_config(config_of(0), VOCABULARY).images == 0
    assert Budget.from_config(config_of(0.44444), VOCABULARY).images == 5  # a rounded 4/9
    with pytest.raises(UserError, match=r"0\.31.* 3\.4875 images.*0\.26.* \(3 .*0\.35.* \(4 "):
        Budget.from_config(config_of(0.31), VOCABULARY)
    with pytest.raises(UserError, match=r"choose 0\.8 \(9 images\), or .*at most 3 images"):
        Budget.from_config(config_of(1.0), VOCABULARY)


def test_enough_of_both_is_accepted():
    assert accept(budget_of(8), [with_images(*[(20, 1)] * 30)]) == 20
    assert accept(budget_of(8), [with_images(*[(32, 1)] * 30)]) == 32  # exactly full
    assert accept(budget_of(0), []) == 0


def test_no_images_and_no_text():
    assert "no document of a, b has an image; add a source of im" in refusal(budget_of(8), [])
    message = refusal(budget_of(0), [with_images((5, 1))], has_text=False)
    assert "every document of a, b has an image" in message


def test_too_few_images_for_a_step():
    message = refusal(budget_of(8), [with_images(*[(20, 3)] * 5)], world_size=2)
    assert "16 in all, but the training documents" in message and "hold 15" in message
    accept(budget_of(8), [with_images(*[(20, 3)] * 5)])


def test_too_much_text_beside_images():
    message = refusal(budget_of(8), [with_images(*[(40, 1)] * 30)])
    assert "have 40 text tokens per image" in message
    assert "8 images in 4 sequences of 100 leave room for 32" in message
    assert "lower image_share to 0.24 (6 images)" in message


def test_weights_and_images_of_a_document_count():
    often = with_images(*[(28, 2)] * 30, weight=3.0)
    seldom = with_images(*[(200, 1)] * 30)
    # (3 · 28 + 200) / (3 · 2 + 1) = 40.57
    assert "have 40.5714 text tokens" in refusal(budget_of(8), [often, seldom])


kinds = st.lists(st.tuples(st.integers(2, 300), st.integers(1, 4)), min_size=20, max_size=40)


@given(kinds, st.integers(1, 20))
@settings(deadline=None, max_examples=100)
def test_the_advice_against_too_much_text_is_accepted(documents, images):
    assume(images <= budget_of(1).max_images())
    source = [with_images(*documents)]
    try:
        accept(budget_of(images), source)
        return
    except UserError as error:
        found = re.search(r"image_share to [\d.]+ \((\d+) images\)", str(error))
    if found:
        accept(budget_of(int(found[1])), source)
    else:
        text, count = map(sum, zip(*documents, strict=True))
        assert text / count + SPAN > 400


def test_too_much_padding_is_found_by_packing():
    """Ten text tokens where there is room for 32: 8 · 22 of 400 positions are empty."""
    kinds = [(10, 1)] * 30
    check_packing(budget_of(8), 10, 0.45, packer_of(budget_of(8), kinds))
    with pytest.raises(UserError) as caught:
        check_packing(budget_of(8), 10, 0.005, packer_of(budget_of(8), kinds))
    message = str(caught.value)
    assert "have 10 text tokens" in message and "room for 32" in message
    assert "44.00% of the positions of the first 300 micro-batches" in message
    assert "allows 0.50%" in message and "add a source of text" in message
    assert "raise image_share to 0.56 (14 images), which leaves 2.00% on average" in message


@given(
    st.lists(st.tuples(st.integers(2, 60), st.integers(1, 3)), min_size=1, max_size=12),
    st.floats(0, 0.3),
    st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=20)
def test_padding_is_refused_exactly_where_it_occurs(kinds, max_padding, seed):
    text = sum(text for text, _ in kinds) / sum(images for _, images in kinds)
    budget = budget_of(8, 4, int(8 * (text + SPAN) * 1.05 / 4) + 1)
    assume(budget.max_images() >= 8)
    packer = packer_of(budget, kinds, seed=seed)
    padding = sum(packer.pack().padding for _ in range(60)) / (60 * budget.size)
    try:
        check_packing(budget, text, max_padding, packer_of(budget, kinds, seed=seed), 60)
        assert padding <= max_padding
    except UserError:
        assert padding > max_padding


def test_images_that_never_fit_beside_their_text_are_found_by_packing():
    """On average there is room for 18 tokens, but a sequence of an image has room for none."""
    budget = budget_of(2, 4, SPAN)
    accept(budget, [with_images((32, 2), (32, 2))])
    text = iter(lambda: EncodedDocument("b", 0, np.full(50, 6)), None)
    with pytest.raises(UserError, match=r"10001 documents wait .* room for 0 in the fullest .*low"):
        check_packing(budget, 16, 0.005, packer_of(budget, [(32, 2)], text))


def test_text_documents_leave_no_padding():
    text = iter(lambda: EncodedDocument("b", 0, np.full(50, 6)), None)
    check_packing(budget_of(8), 10, 0.0, packer_of(budget_of(8), [(10, 1)] * 30, text))
