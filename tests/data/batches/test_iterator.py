"""Batches over encoded shards: mixing, ranks, single passes, saved states."""

import contextlib
import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.data.batches.iterator import Batches, prefetch, reshard
from moma.data.batches.packing import NO_LABEL, Batch, Packer
from moma.data.config import DataConfig
from moma.data.documents import Document
from moma.errors import UserError
from moma.recipe import check
from tests.data.encode.encoding import encode_source
from tests.factories import ListSource, make_vocabulary, solid_image

VOCABULARY = make_vocabulary(5000)
ARRAYS = ("tokens_BS", "labels_BS", "document_ids_BS", "positions_BS")


class Source:
    """Documents of one word, their number, repeated; a number names a document."""

    weight = 1.0

    def __init__(self, name, numbers, with_images):
        self.name, self.numbers, self.with_images = name, numbers, with_images

    def documents(self):
        for number in self.numbers:
            words = " ".join([str(number)] * (1 + number % 7))
            image = solid_image(0, (1, 1), "L")
            segments = (words, image) if self.with_images(number) else (words,)
            yield Document(str(number), segments, held_out=number % 4 == 3)


SOURCES = {
    "mixed": Source("mixed", range(100, 180), lambda number: number % 2 == 0),
    "images": Source("images", range(200, 230), lambda number: True),
    "words": Source("words", range(300, 360), lambda number: False),
}


def encode(source, folder):
    encode_source(
        ListSource(*source.documents(), name=source.name),
        lambda texts: [[int(word) for word in text.split()] for text in texts],
        lambda images: np.zeros((len(images), 4), dtype=int),
        VOCABULARY,
        0.0,
        folder / "shards" / source.name,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    for source in SOURCES.values():
        encode(source, folder)
    return folder


def config_of(folder, names=("mixed", "images", "words"), weights=None, **changes):
    weights = weights or {}
    sources = [
        {"kind": "text", "name": name, "path": "unused", "weight": weights.get(name, 1.0)}
        for name in names
    ]
    fields = {"path": folder, "micro_batch_size": 2, "sequence_length": 32, "image_share": 0.25}
    return check(DataConfig, {**fields, "sources": sources, **changes}, "test")


def batches_of(folder, seed=1, rank=0, world_size=1, split="train", repeat=None, **changes):
    return Batches(config_of(folder, **changes), VOCABULARY, seed, rank, world_size, split, repeat)


def numbers_in(batches):
    """How often each document was started: by the word after its beginning."""
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
        assert batch.images == 4
        assert np.isin(batch.tokens_BS, VOCABULARY.image_codes).mean() == 0.25
        assert batch.padding == 0


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_single_pass_shows_every_document_once(folder, split):
    batches = batches_of(folder, split=split, repeat=False)
    assert batches.remaining_documents == len(expected_words(split == "held_out"))
    found = list(batches)
    assert words_in(found) == expected_words(split == "held_out")
    assert numbers_in(found) == dict.fromkeys(expected_words(split == "held_out"), 1)
    assert batches.remaining_documents == 0
    assert all(batch.images <= 4 for batch in found)


def test_held_out_is_a_single_pass_by_default(folder):
    assert words_in(batches_of(folder, split="held_out")) == expected_words(True)


def test_ranks_share_the_documents(folder):
    parts = [
        words_in(batches_of(folder, rank=rank, world_size=3, repeat=False)) for rank in range(3)
    ]
    assert not parts[0].keys() & parts[1].keys()
    assert sum(parts, Counter()) == expected_words(False)


def test_the_seed_determines_the_order(folder):
    first = take(batches_of(folder, seed=1), 3)
    assert_same(first, take(batches_of(folder, seed=1), 3))
    with pytest.raises(AssertionError):
        assert_same(first, take(batches_of(folder, seed=2), 3))


def test_weights_hold_within_a_percent_over_1000_batches(folder):
    """Share of documents, among those with images and among those without; on every rank."""
    weights = {"mixed": 1.0, "images": 3.3, "words": 0.45}
    for rank in range(2):
        batches = batches_of(folder, rank=rank, world_size=2, weights=weights)
        found: Counter[tuple[bool, str]] = Counter()
        for number, count in numbers_in(take(batches, 1000)).items():
            for name, source in SOURCES.items():
                if number in source.numbers:
                    found[source.with_images(number), name] += count
        for with_images in (True, False):
            counts = {
                name: found[with_images, name] for name in weights if found[with_images, name]
            }
            assert len(counts) == 2
            for name, count in counts.items():
                share = weights[name] / sum(weights[other] for other in counts)
                assert count / sum(counts.values()) == pytest.approx(share, rel=0.01)


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


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_workers_change_nothing(folder, workers):
    """Saved after any batch, restored with any number of workers: the same 100 follow."""

    def opened(count):
        config = config_of(folder, workers=count, prefetch=3)
        return prefetch(Batches(config, VOCABULARY, seed=1), config)

    expected = take(batches_of(folder, workers=0), 120)
    with closing(opened(workers)) as batches:
        states = [json.dumps(batches.get_state())]
        for batch in expected[:20]:
            assert_same([batch], take(batches, 1))
            states.append(json.dumps(batches.get_state()))
    for at, others in ((0, (0, 4)), (1, (1,)), (13, (0, 1, 4)), (20, (0,))):
        for other in others:
            with closing(opened(other)) as restored:
                take(restored, 2)
                restored.set_state(json.loads(states[at]))
                assert json.loads(json.dumps(restored.get_state())) == json.loads(states[at])
                assert_same(expected[at : at + 100], take(restored, 100))


def test_an_error_in_the_background_is_raised(folder, monkeypatch):
    def break_down(self):
        raise UserError("no room")

    monkeypatch.setattr(Packer, "pack", break_down)
    config = config_of(folder)
    with (
        closing(prefetch(Batches(config, VOCABULARY, seed=1), config)) as batches,
        pytest.raises(UserError, match="no room"),
    ):
        next(batches)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_another_number_of_ranks_continues_without_loss(folder, old, new, steps):
    def ranks(count):
        configs = [config_of(folder, workers=1, prefetch=2) for _ in range(count)]
        batches = [
            Batches(config, VOCABULARY, 1, rank, count, repeat=False)
            for rank, config in enumerate(configs)
        ]
        return [prefetch(*pair) for pair in zip(batches, configs, strict=True)]

    former, found = ranks(old), []
    for batches in former:
        found += take(batches, steps)
    states = reshard([batches.get_state() for batches in former], new)
    for batches, state in zip(ranks(new), states, strict=True):
        with closing(batches):
            batches.set_state(json.loads(json.dumps(state)))
            found += batches
    for batches in former:
        batches.close()
    # Every document once, and every word of it.
    assert numbers_in(found) == dict.fromkeys(expected_words(False), 1)
    assert words_in(found) == expected_words(False)


kinds = st.lists(st.lists(st.none() | st.integers(1, 45), min_size=1, max_size=6), max_size=14)


class Random:
    """A document for each kind: numbers of words, and None for an image."""

    def __init__(self, name, first, kinds):
        self.name, self.first, self.kinds = name, first, kinds

    def documents(self):
        for number, kind in enumerate(self.kinds, self.first):
            image = solid_image(0, (1, 1), "L")
            segments = [image if part is None else " ".join([str(number)] * part) for part in kind]
            yield Document(str(number), tuple(segments), held_out=False)


@given(kinds.filter(len), kinds.filter(len), st.integers(1, 3), st.sampled_from([0.125, 0.25, 0.5]))
@settings(deadline=None, max_examples=25)
def test_random_documents_are_shown_once_on_any_number_of_ranks(one, other, world_size, share):
    sources = [Random("one", 100, one), Random("other", 200, other)]
    words: Counter[int] = Counter()
    for source in sources:
        for number, kind in enumerate(source.kinds, source.first):
            words[number] += sum(part or 0 for part in kind)
    with TemporaryDirectory() as folder:
        for source in sources:
            encode(source, Path(folder))
        config = config_of(
            Path(folder), names=("one", "other"), micro_batch_size=3, image_share=share
        )
        budget = round(share * 3 * 32 / 4)
        found: list[Batch] = []
        for rank in range(world_size):
            found += Batches(config, VOCABULARY, 1, rank, world_size, repeat=False)
            with contextlib.suppress(UserError):  # these documents cannot meet the share
                for batch in take(Batches(config, VOCABULARY, 1, rank, world_size), 10):
                    assert (batch.tokens_BS == VOCABULARY.begin_image).sum() == budget
                    assert np.isin(batch.tokens_BS, VOCABULARY.image_codes).mean() == share
        assert words_in(found) == +words
        images = sum(kind.count(None) for kind in one + other)
        assert sum(batch.images for batch in found) == images
        assert all(batch.images <= budget for batch in found)


def test_labels_are_the_next_word_of_the_document(folder):
    for batch in take(batches_of(folder), 20):
        same = batch.document_ids_BS[:, 1:] == batch.document_ids_BS[:, :-1]
        assert (batch.labels_BS[:, :-1][same] == batch.tokens_BS[:, 1:][same]).all()
        ends = batch.tokens_BS == VOCABULARY.end
        assert ((batch.labels_BS == NO_LABEL) == ends).all()


def test_states_of_other_data_or_ranks_are_refused(folder):
    state = batches_of(folder).get_state()
    with pytest.raises(UserError, match="sources, weights, shards or seed have changed"):
        batches_of(folder, seed=2).set_state(state)
    with pytest.raises(UserError, match="1 ranks, but there are 2"):
        batches_of(folder, world_size=2).set_state(state)


def test_the_batch_shape_may_change_between_saving_and_restoring(folder):
    batches = batches_of(folder, repeat=False)
    found = take(batches, 3)
    longer = batches_of(folder, repeat=False, micro_batch_size=1, sequence_length=64)
    longer.set_state(batches.get_state())
    assert words_in([*found, *longer]) == expected_words(False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("words",)}, "no document of words has an image"),
        (
            {"names": ("images",)},
            r"4 images in 2 sequences of 32 leave room for 10 per image, .* padding",
        ),
        ({"image_share": 0.625}, r"leave room for 0\.4 per image; lower image_share"),
        ({"micro_batch_size": 40}, r"a step takes 80 images .* hold 63 in all"),
        ({"names": ("images",), "image_share": 0.0}, "every document of images has an im"),
        ({"image_share": 0.26}, r"choose 0\.25 \(4 images\) or 0\.3125 \(5 images\)"),
        ({"names": ("nowhere",)}, "nowhere: no complete shards"),
        ({"names": ("words", "words")}, "several sources are named words"),
        ({"micro_batch_size": 0}, "'micro_batch_size'"),
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
                "micro_batch_size": 1,
                "sequence_length": 8,
                "image_share": 0,
                "sources": [{"kind": "sound"}],
            },
            "test",
        )
