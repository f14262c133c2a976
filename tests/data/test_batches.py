"""Batches over encoded shards: mixing, ranks, single passes, saved states."""

import json
from collections import Counter

import numpy as np
import pytest
from grain.experimental import ThreadPrefetchDatasetIterator
from PIL import Image

from moma.data.batches import Batches, DataConfig, share_out
from moma.data.documents import Document, Picture
from moma.data.encoding import encode_source
from moma.data.packing import NO_LABEL
from moma.errors import UserError
from moma.recipe import check
from moma.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    size=5000,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=tuple(range(5, 21)),
    codes_per_image=4,
)
ARRAYS = ("tokens_BS", "labels_BS", "documents_BS", "positions_BS")


class Source:
    """Documents whose one word is their number, repeated; a number names a document."""

    weight = 1.0

    def __init__(self, name, numbers, pictured):
        self.name, self.numbers, self.pictured = name, numbers, pictured

    def documents(self):
        for number in self.numbers:
            words = " ".join([str(number)] * (1 + number % 7))
            picture = Picture("", lambda: Image.new("L", (1, 1)))
            segments = (words, picture) if self.pictured(number) else (words,)
            yield Document(str(number), segments, held_out=number % 4 == 3)


SOURCES = {
    "mixed": Source("mixed", range(100, 180), lambda number: number % 2 == 0),
    "pictures": Source("pictures", range(200, 230), lambda number: True),
    "words": Source("words", range(300, 360), lambda number: False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for name, source in SOURCES.items():
        encode_source(
            source,
            lambda texts: [[int(word) for word in text.split()] for text in texts],
            lambda pictures: np.zeros((len(pictures), 4), dtype=int),
            VOCABULARY,
            0.0,
            folder / "shards" / name,
        )
    return folder


def config_of(folder, names=("mixed", "pictures", "words"), weights=None, **changes):
    weights = weights or {}
    sources = [
        {"kind": "text", "name": name, "path": "unused", "weight": weights.get(name, 1.0)}
        for name in names
    ]
    fields = {"path": folder, "rows": 2, "row_length": 32, "picture_share": 0.25}
    return check(DataConfig, {**fields, "sources": sources, **changes}, "test")


def batches_of(folder, seed=1, rank=0, world_size=1, split="train", repeat=None, **changes):
    return Batches(config_of(folder, **changes), VOCABULARY, seed, rank, world_size, split, repeat)


def numbers_in(batches):
    """How often each document was begun: by the word after its beginning."""
    found: Counter[int] = Counter()
    for batch in batches:
        tokens, labels = batch.tokens_BS, batch.labels_BS
        found.update(labels[tokens == VOCABULARY.beginning].tolist())
    return found


def words_in(batches):
    return Counter(
        int(word) for batch in batches for word in batch.tokens_BS[batch.tokens_BS >= 100]
    )


def expected_words(held_out):
    return Counter(
        {
            number: 1 + number % 7
            for source in SOURCES.values()
            for number in source.numbers
            if (number % 4 == 3) == held_out
        }
    )


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        for name in ARRAYS:
            assert (getattr(one, name) == getattr(other, name)).all()


def test_training_batches_are_exact_and_without_padding(folder):
    for batch in take(batches_of(folder), 100):
        assert batch.pictures == 4
        assert np.isin(batch.tokens_BS, VOCABULARY.image_codes).mean() == 0.25
        assert batch.padding == 0


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_single_pass_shows_every_document_once(folder, split):
    batches = batches_of(folder, split=split, repeat=False)
    assert batches.unreached_documents == len(expected_words(split == "held_out"))
    found = list(batches)
    assert words_in(found) == expected_words(split == "held_out")
    assert numbers_in(found) == dict.fromkeys(expected_words(split == "held_out"), 1)
    assert batches.unreached_documents == 0
    assert all(batch.pictures <= 4 for batch in found)


def test_held_out_is_a_single_pass_by_default(folder):
    assert words_in(batches_of(folder, split="held_out")) == expected_words(True)


def test_ranks_share_the_documents(folder):
    parts = [
        words_in(batches_of(folder, rank=rank, world_size=3, repeat=False)) for rank in range(3)
    ]
    assert not parts[0].keys() & parts[1].keys()
    assert sum(parts, Counter()) == expected_words(False)


def test_seeds_decide_the_order(folder):
    first = take(batches_of(folder, seed=1), 3)
    assert_same(first, take(batches_of(folder, seed=1), 3))
    with pytest.raises(AssertionError):
        assert_same(first, take(batches_of(folder, seed=2), 3))


def test_weights_count_documents(folder):
    batches = batches_of(folder, weights={"mixed": 1.0, "pictures": 3.0, "words": 0.5})
    found = numbers_in(take(batches, 150))
    with_pictures: Counter[tuple[str, bool]] = Counter()
    for number, count in found.items():
        for name, source in SOURCES.items():
            if number in source.numbers:
                with_pictures[name, source.pictured(number)] += count
    ratio = with_pictures["pictures", True] / with_pictures["mixed", True]
    assert 2.8 < ratio < 3.2
    assert 1.9 < with_pictures["mixed", False] / with_pictures["words", False] < 2.1


@pytest.mark.parametrize("before", [0, 1, 7, 40])
def test_a_restored_state_gives_the_same_batches(folder, before):
    batches = batches_of(folder)
    take(batches, before)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 10)
    restored = batches_of(folder)
    take(restored, 3)
    restored.set_state(state)
    assert_same(expected, take(restored, 10))


def test_grain_can_prefetch_and_its_state_is_exact(folder):
    expected = take(batches_of(folder), 8)
    prefetched = ThreadPrefetchDatasetIterator(batches_of(folder), 3)
    assert_same(expected[:4], take(prefetched, 4))
    state = json.loads(json.dumps(prefetched.get_state()))
    prefetched.close()
    restored = batches_of(folder)
    restored.set_state(state)
    assert_same(expected[4:], take(restored, 4))


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (3, 2), (2, 3)])
def test_another_number_of_ranks_goes_on_without_loss(folder, old, new):
    def ranks(count):
        return [batches_of(folder, rank=r, world_size=count, repeat=False) for r in range(count)]

    former = ranks(old)
    found = [batch for batches in former for batch in take(batches, 2)]
    states = share_out([batches.get_state() for batches in former], new)
    for batches, state in zip(ranks(new), states, strict=True):
        batches.set_state(json.loads(json.dumps(state)))
        found += batches
    assert words_in(found) == expected_words(False)


def test_labels_are_the_next_word_of_the_document(folder):
    for batch in take(batches_of(folder), 20):
        same = batch.documents_BS[:, 1:] == batch.documents_BS[:, :-1]
        assert (batch.labels_BS[:, :-1][same] == batch.tokens_BS[:, 1:][same]).all()
        ends = batch.tokens_BS == VOCABULARY.end
        assert ((batch.labels_BS == NO_LABEL) == ends).all()


def test_states_of_other_data_or_ranks_are_refused(folder):
    state = batches_of(folder).get_state()
    with pytest.raises(UserError, match="sources, weights, shards or seed have changed"):
        batches_of(folder, seed=2).set_state(state)
    with pytest.raises(UserError, match="1 ranks, but there are 2"):
        batches_of(folder, world_size=2).set_state(state)


def test_rows_may_change_between_saving_and_restoring(folder):
    batches = batches_of(folder, repeat=False)
    found = take(batches, 3)
    longer = batches_of(folder, repeat=False, rows=1, row_length=64)
    longer.set_state(batches.get_state())
    assert words_in([*found, *longer]) == expected_words(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("words",)}, "no document of words has a picture"),
        ({"names": ("pictures",), "picture_share": 0.0}, "every document of pictures has a pict"),
        ({"picture_share": 0.26}, r"choose 0\.25 \(4 pictures\) or 0\.3125 \(5 pictures\)"),
        ({"names": ("nowhere",)}, "nowhere: no complete shards"),
        ({"names": ("words", "words")}, "several sources are named words"),
        ({"rows": 0}, "'rows'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(folder, changes, message):
    with pytest.raises(UserError, match=message):
        batches_of(folder, **changes)


def test_sources_are_chosen_by_kind(folder):
    with pytest.raises(UserError, match="sketches"):
        check(
            DataConfig,
            {
                "path": folder,
                "rows": 1,
                "row_length": 8,
                "picture_share": 0,
                "sources": [{"kind": "sound"}],
            },
            "test",
        )
