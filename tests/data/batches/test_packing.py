"""The packer's promises, checked on random documents."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.data.batches.packing import NO_LABEL, EncodedDocument, Packer
from moma.errors import UserError
from tests.factories import make_vocabulary

CODES = 4
VOCABULARY = make_vocabulary(60_000, codes=range(5, 25), codes_per_image=CODES)
SPAN = VOCABULARY.image_span
FIRST_TEXT = 25


def encode(row, segments, source="a"):
    """A document; its text ids count up from a start of its own, so that each is recognized."""
    text = itertools.count(FIRST_TEXT + row * 250)
    ids = [VOCABULARY.beginning]
    for length in segments:
        if length is None:
            ids += VOCABULARY.wrap_image(np.arange(CODES) + row % 10)
        else:
            ids += itertools.islice(text, length)
    return EncodedDocument(source, row, np.array([*ids, VOCABULARY.end], dtype=np.uint16))


def documents_of(kinds, first=0):
    return [encode(row, segments) for row, segments in enumerate(kinds, first)]


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
    for index, document_ids_S in enumerate(batch.document_ids_BS):
        for number in range(document_ids_S.max() + 1):
            (where,) = np.nonzero(document_ids_S == number)
            assert (np.diff(where) == 1).all()
            assert (batch.positions_BS[index, where] == np.arange(len(where))).all()
            yield batch.tokens_BS[index, where], batch.labels_BS[index, where]


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
    batch_size, length, images = shape
    image_documents = documents_of(with_images) if images else []
    with_text = documents_of(text, first=100)
    packer = Packer(batch_size, length, images, VOCABULARY, iter(image_documents), iter(with_text))
    batches = pack_all(packer)
    assert_shows_once(batches, image_documents + with_text)
    assert packer.open_documents == 0


@given(kinds_with_images.filter(len), text_kinds.filter(len), shapes)
@settings(deadline=None, max_examples=150)
def test_every_micro_batch_is_full_and_meets_the_budget(with_images, text, shape):
    batch_size, length, images = shape
    documents = documents_of(with_images)
    packer = Packer(
        batch_size,
        length,
        images,
        VOCABULARY,
        itertools.cycle(documents),
        itertools.cycle(documents_of(text, first=100)),
        max_open_documents=500,
    )
    for _ in range(20):
        try:
            batch = packer.pack()
        except UserError:  # only where texts are long for the sequences
            fullest = -(-images // batch_size)
            if max(length_before_an_image(documents)) > length // fullest - SPAN:
                return
            text_of_each = sum(len(ids) for *_, ids in documents) / images_in(documents) - SPAN
            assert text_of_each > 0.8 * (batch_size * length / images - SPAN)
            return
        assert batch.images == images
        assert (batch.tokens_BS == VOCABULARY.begin_image).sum() == images
        assert batch.padding == 0
        assert (batch.document_ids_BS >= 0).all()


@given(kinds_with_images, text_kinds, shapes)
@settings(deadline=None, max_examples=100)
def test_no_image_is_cut(with_images, text, shape):
    batch_size, length, images = shape
    with_text = documents_of(text, first=100)
    streams = iter(documents_of(with_images)), iter(with_text)
    for batch in pack_all(Packer(batch_size, length, images, VOCABULARY, *streams)):
        for tokens, _ in pieces_of(batch):
            starts = np.flatnonzero(tokens == VOCABULARY.begin_image)
            codes = np.isin(tokens, VOCABULARY.image_codes)
            assert codes.sum() == len(starts) * CODES
            for start in starts:
                assert codes[start + 1 : start + 1 + CODES].all()
                assert tokens[start + 1 + CODES] == VOCABULARY.end_image


@given(kinds_with_images, text_kinds, shapes, st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_a_restored_packer_continues_identically(with_images, text, shape, before):
    batch_size, length, images = shape
    documents = documents_of(with_images), documents_of(text, first=100)
    by_location = {(d.source, d.row): d.ids for d in itertools.chain(*documents)}
    taken: tuple[list, list] = ([], [])

    def recorded(kind):
        for document in documents[kind]:
            taken[kind].append(document)
            yield document

    packer = Packer(batch_size, length, images, VOCABULARY, recorded(0), recorded(1))
    for _ in range(before):
        packer.pack()
    state = json.loads(json.dumps(packer.get_state()))
    rest = [iter(documents[kind][len(taken[kind]) :]) for kind in (0, 1)]
    restored = Packer(batch_size, length, images, VOCABULARY, rest[0], rest[1])
    restored.set_state(state, lambda source, row: by_location[source, row])
    for _ in range(5):
        expected, found = packer.pack(), restored.pack()
        assert found.origins == expected.origins
        for name in ("tokens_BS", "labels_BS", "document_ids_BS", "positions_BS"):
            assert (getattr(expected, name) == getattr(found, name)).all()


@given(kinds_with_images, text_kinds, shapes)
@settings(deadline=None, max_examples=50)
def test_a_layout_is_that_of_the_batch(with_images, text, shape):
    batch_size, length, images = shape
    packers = []
    for _ in range(2):
        streams = iter(documents_of(with_images)), iter(documents_of(text, first=100))
        packers.append(Packer(batch_size, length, images, VOCABULARY, *streams))
    for _ in range(5):
        layout, batch = packers[0].plan(), packers[1].pack()
        assert (layout.images, layout.padding) == (batch.images, batch.padding)
        assert batch.padding == (batch.document_ids_BS < 0).sum()
        pieces = itertools.chain.from_iterable(layout.sequences)
        for (document, start, stop), (tokens, _) in zip(pieces, pieces_of(batch), strict=True):
            assert (document.ids[start:stop] == tokens).all()


def test_short_captions_stay_with_their_image():
    with_images = [encode(row, [5, None] if row % 2 else [None, 5]) for row in range(60)]
    text = itertools.cycle([encode(100, [30])])
    packer = Packer(3, 40, 6, VOCABULARY, iter(with_images), text)
    for _ in range(10):
        for tokens, labels in pieces_of(packer.pack()):
            if (tokens == VOCABULARY.begin_image).any():
                assert tokens[0] == VOCABULARY.beginning
                assert labels[-1] == NO_LABEL


def test_a_caption_stays_with_its_image_though_longer_text_is_to_come():
    """The text before the next image would fit the sequence only without the caption."""
    with_images = [encode(0, [None, 10]), encode(1, [25, None]), encode(2, [None])]
    packer = Packer(1, 40, 2, VOCABULARY, iter(with_images), iter([encode(3, [30])]))
    (first,) = (labels for tokens, labels in pieces_of(packer.pack()) if FIRST_TEXT in tokens)
    assert first[-1] == NO_LABEL


def test_images_are_anywhere_in_a_sequence():
    with_images = itertools.cycle([encode(0, [None])])
    packer = Packer(2, 40, 2, VOCABULARY, with_images, itertools.cycle([encode(100, [6])]))
    starts = [
        np.argmax(packer.pack().tokens_BS == VOCABULARY.begin_image, axis=1) for _ in range(20)
    ]
    assert np.min(starts) < 10 and np.max(starts) > 20


def test_text_longer_than_a_sequence_is_packed_before_its_image():
    with_images = itertools.cycle([encode(0, [100, None]), encode(1, [None])])
    packer = Packer(2, 40, 2, VOCABULARY, with_images, iter([]))
    assert sum(packer.pack().images for _ in range(30)) == 60


def test_quotas_differ_by_at_most_one_and_rotate():
    with_images = itertools.cycle([encode(0, [None])])
    text = itertools.cycle([encode(100, [30])])
    packer = Packer(3, 40, 4, VOCABULARY, with_images, text)
    counts = [(packer.pack().tokens_BS == VOCABULARY.begin_image).sum(axis=1) for _ in range(3)]
    assert all(sorted(count) == [1, 1, 2] for count in counts)
    assert (np.sum(counts, axis=0) == 4).all()


def test_sequences_without_text_are_padded():
    packer = Packer(2, 20, 2, VOCABULARY, itertools.cycle([encode(0, [None])]), iter([]))
    batch = packer.pack()
    assert batch.padding == 40 - 2 * (SPAN + 2)
    padded = batch.document_ids_BS == -1
    assert padded.sum() == batch.padding
    assert (batch.tokens_BS[padded] == VOCABULARY.padding).all()
    assert (batch.labels_BS[padded] == NO_LABEL).all()
    assert (batch.positions_BS[padded] == 0).all()


def test_accumulating_text_is_refused_with_numbers():
    with_images = itertools.cycle([encode(0, [100, None])])
    packer = Packer(1, 20, 3, VOCABULARY, with_images, iter([]), max_open_documents=50)
    with pytest.raises(
        UserError, match=r"51 documents wait.*102 text tokens.*room for 0 in the fullest .*lower"
    ):
        packer.pack()
