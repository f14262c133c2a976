"""The packer against what a reader of its docstring would expect, on random documents."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.data.batches.packing import NO_LABEL, EncodedDocument, Packer, empty_batch, image_budget
from moma.errors import UserError
from moma.vocabulary import Vocabulary

CODES = 4
VOCABULARY = Vocabulary(
    size=60_000,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=tuple(range(5, 25)),
    codes_per_image=CODES,
)
SPAN = VOCABULARY.image_span
FIRST_TEXT = 25


def encode(row, segments, source="a"):
    """A document; its text ids count up from a start of its own, so that each is recognised."""
    text = itertools.count(FIRST_TEXT + row * 250)
    ids = [VOCABULARY.beginning]
    for length in segments:
        if length is None:
            ids += VOCABULARY.wrap_image(np.arange(CODES) + row % 10)
        else:
            ids += itertools.islice(text, length)
    return EncodedDocument(source, row, np.array([*ids, VOCABULARY.end], dtype=np.uint16))


def documents_of(kinds):
    return [encode(row, segments) for row, segments in enumerate(kinds)]


def images_in(documents):
    return sum(int((ids == VOCABULARY.begin_image).sum()) for *_, ids in documents)


def length_before_an_image(documents):
    for *_, ids in documents:
        starts = np.flatnonzero(ids == VOCABULARY.begin_image)
        yield from np.diff([-SPAN, *starts]) - SPAN


texts = st.integers(0, 40)
kinds_with_images = st.lists(
    st.lists(st.one_of(st.none(), st.integers(0, 12)), max_size=5).map(lambda some: [*some, None])
    | st.tuples(texts, st.none(), texts).map(list),
    max_size=25,
)
text_kinds = st.lists(st.tuples(texts).map(list), max_size=25)
shapes = st.tuples(st.integers(1, 3), st.integers(20, 40), st.integers(0, 6)).filter(
    lambda shape: shape[2] <= shape[0] * (shape[1] // SPAN - 1)
)


def pack_all(packer, limit=2_000):
    batches = []
    while (batch := packer.pack()).padding < batch.tokens_BS.size:
        batches.append(batch)
        assert len(batches) < limit
    return batches


def pieces_of(batch):
    """(tokens, labels) of every piece, by reading the arrays as the model would."""
    for row in range(len(batch.tokens_BS)):
        for number in range(batch.documents_BS[row].max() + 1):
            (where,) = np.nonzero(batch.documents_BS[row] == number)
            assert (np.diff(where) == 1).all()
            assert (batch.positions_BS[row, where] == np.arange(len(where))).all()
            yield batch.tokens_BS[row, where], batch.labels_BS[row, where]


def assert_shows_once(batches, documents):
    """Every token of every document once, in order, each piece with its document's origin."""
    remaining = {(d.source, d.row): d.ids.astype(np.int64) for d in documents}
    for batch in batches:
        origins = itertools.chain.from_iterable(batch.origins)
        for (tokens, labels), key in zip(pieces_of(batch), origins, strict=True):
            ids = remaining[key]
            assert (ids[: len(tokens)] == tokens).all() and len(ids) >= len(tokens)
            assert labels[-1] == (ids[len(tokens)] if len(ids) > len(tokens) else NO_LABEL)
            assert (labels[:-1] == tokens[1:]).all()
            remaining[key] = remaining[key][len(tokens) :]
            if not len(remaining[key]):
                del remaining[key]
    assert not remaining


@given(kinds_with_images, text_kinds, shapes)
@settings(deadline=None, max_examples=150)
def test_an_epoch_shows_every_token_once_and_in_order(with_images, text, shape):
    rows, length, images = shape
    image_documents = documents_of(with_images) if images else []
    with_text = [encode(100 + row, kind) for row, kind in enumerate(text)]
    packer = Packer(rows, length, images, VOCABULARY, iter(image_documents), iter(with_text))
    batches = pack_all(packer)
    assert_shows_once(batches, image_documents + with_text)
    assert packer.open_documents == (0, 0)


@given(kinds_with_images.filter(len), text_kinds.filter(len), shapes)
@settings(deadline=None, max_examples=150)
def test_every_micro_batch_is_full_and_meets_its_budget(with_images, text, shape):
    rows, length, images = shape
    documents = documents_of(with_images)
    packer = Packer(
        rows,
        length,
        images,
        VOCABULARY,
        itertools.cycle(documents),
        itertools.cycle(encode(100 + row, kind) for row, kind in enumerate(text)),
        max_open_documents=500,
    )
    for _ in range(20):
        try:
            batch = packer.pack()
        except UserError:  # only where texts are long for the rows
            fullest = -(-images // rows)
            if max(length_before_an_image(documents)) > length // fullest - SPAN:
                return
            text_of_each = sum(len(ids) for *_, ids in documents) / images_in(documents) - SPAN
            assert text_of_each > 0.8 * (rows * length / images - SPAN)
            return
        assert batch.images == images
        assert (batch.tokens_BS == VOCABULARY.begin_image).sum() == images
        assert batch.padding == 0
        assert (batch.documents_BS >= 0).all()


@given(kinds_with_images, text_kinds, shapes)
@settings(deadline=None, max_examples=100)
def test_no_image_is_cut(with_images, text, shape):
    rows, length, images = shape
    with_text = [encode(100 + row, kind) for row, kind in enumerate(text)]
    streams = iter(documents_of(with_images)), iter(with_text)
    for batch in pack_all(Packer(rows, length, images, VOCABULARY, *streams)):
        for tokens, _ in pieces_of(batch):
            starts = np.flatnonzero(tokens == VOCABULARY.begin_image)
            codes = np.isin(tokens, VOCABULARY.image_codes)
            assert codes.sum() == len(starts) * CODES
            for start in starts:
                assert codes[start + 1 : start + 1 + CODES].all()
                assert tokens[start + 1 + CODES] == VOCABULARY.end_image


@given(kinds_with_images, text_kinds, shapes, st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_a_restored_packer_goes_on_identically(with_images, text, shape, before):
    rows, length, images = shape
    documents = [
        *documents_of(with_images),
        *(encode(100 + r, kind) for r, kind in enumerate(text)),
    ]
    by_place = {(d.source, d.row): d.ids for d in documents}
    streams = iter(documents[: len(with_images)]), iter(documents[len(with_images) :])
    packer = Packer(rows, length, images, VOCABULARY, *streams)
    for _ in range(before):
        packer.pack()
    state = json.loads(json.dumps(packer.get_state()))
    rest = [list(stream) for stream in streams]
    restored = Packer(rows, length, images, VOCABULARY, iter(rest[0]), iter(rest[1]))
    restored.set_state(state, lambda source, row: by_place[source, row])
    packer._with_images, packer._text = map(iter, rest)
    for _ in range(5):
        expected, found = packer.pack(), restored.pack()
        for name in ("tokens_BS", "labels_BS", "documents_BS", "positions_BS"):
            assert (getattr(expected, name) == getattr(found, name)).all()


def test_short_captions_stay_with_their_image():
    with_images = [encode(row, [5, None] if row % 2 else [None, 5]) for row in range(60)]
    text = itertools.cycle([encode(100, [30])])
    packer = Packer(3, 40, 6, VOCABULARY, iter(with_images), text)
    for _ in range(10):
        for tokens, labels in pieces_of(packer.pack()):
            if (tokens == VOCABULARY.begin_image).any():
                assert tokens[0] == VOCABULARY.beginning
                assert labels[-1] == NO_LABEL


def test_text_longer_than_a_row_is_drained_before_its_image():
    with_images = itertools.cycle([encode(0, [100, None]), encode(1, [None])])
    packer = Packer(2, 40, 2, VOCABULARY, with_images, iter([]))
    assert sum(packer.pack().images for _ in range(30)) == 60


def test_quotas_differ_by_at_most_one_and_take_turns():
    with_images = itertools.cycle([encode(0, [None])])
    text = itertools.cycle([encode(100, [30])])
    packer = Packer(3, 40, 4, VOCABULARY, with_images, text)
    counts = [(packer.pack().tokens_BS == VOCABULARY.begin_image).sum(axis=1) for _ in range(3)]
    assert all(sorted(count) == [1, 1, 2] for count in counts)
    assert (np.sum(counts, axis=0) == 4).all()


def test_padding_fills_rows_without_text():
    packer = Packer(2, 20, 2, VOCABULARY, itertools.cycle([encode(0, [None])]), iter([]))
    batch = packer.pack()
    assert batch.padding == 40 - 2 * (SPAN + 2)
    padded = batch.documents_BS == -1
    assert padded.sum() == batch.padding
    assert (batch.tokens_BS[padded] == VOCABULARY.padding).all()
    assert (batch.labels_BS[padded] == NO_LABEL).all()
    assert (batch.positions_BS[padded] == 0).all()


def test_too_much_text_beside_images_is_refused_with_numbers():
    with_images = itertools.cycle([encode(0, [100, None])])
    packer = Packer(1, 20, 3, VOCABULARY, with_images, iter([]), max_open_documents=50)
    with pytest.raises(UserError, match=r"50 documents wait.*102 text tokens.*room for 0 .*lower"):
        packer.pack()


def test_budget_is_a_whole_number_of_images():
    assert image_budget(3, 40, 0.3, VOCABULARY) == 9
    assert image_budget(3, 40, 0.0, VOCABULARY) == 0
    assert image_budget(3, 40, 0.16666, VOCABULARY) == 5
    with pytest.raises(UserError, match=r"0\.31.* 9\.3 images.*0\.3 \(9 .*0\.333333 \(10 "):
        image_budget(3, 40, 0.31, VOCABULARY)
    with pytest.raises(UserError, match=r"at most 6 images"):
        image_budget(3, 40, 1.0, VOCABULARY)


def test_an_empty_batch_is_padding():
    batch = empty_batch(2, 5, VOCABULARY)
    assert batch.padding == 10 and batch.images == 0
    assert (batch.labels_BS == NO_LABEL).all()
