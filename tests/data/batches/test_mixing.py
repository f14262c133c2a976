"""Pools, mixtures and streams: nothing lost, nothing twice, every rank the whole mixture."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.data.batches.mixing import DocumentStream, Mixture, Pool, reshard_stream


def pool_of(size, weight=1.0, key="k", source="a"):
    return Pool({source: np.arange(size) * 3}, weight, key)


def fetch(source, row):
    return np.array([row])


def stream_of(pools, rank=0, world_size=1, repeat=True, readers=None):
    return DocumentStream(pools, repeat, fetch, rank, world_size, readers)


def places(documents):
    return [(document.source, document.row) for document in documents]


# Both ways of shuffling: by table, and by grain.
@pytest.mark.parametrize("size", [1, 2, 10, 1000, (1 << 16) + 3])
def test_every_pass_shows_a_pool_once_in_an_order_of_its_own(size):
    pool, other = pool_of(size), pool_of(size, key="other")
    first, second = ([pool[n].row for n in range(size * p, size * (p + 1))] for p in (0, 1))
    assert sorted(first) == sorted(second) == list(range(0, 3 * size, 3))
    if size >= 10:
        assert first != second
        assert first != sorted(first)
        assert first[:100] != [other[n].row for n in range(min(size, 100))]


def test_a_pool_of_several_sources_mixes_them():
    pool = Pool({"a": np.arange(50), "b": np.arange(50)}, 1.0, "k")
    found = [pool[n] for n in range(100)]
    assert Counter(place.source for place in found) == {"a": 50, "b": 50}
    assert len(set(found)) == 100
    assert 15 < sum(place.source == "a" for place in found[:50]) < 35


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_each_share_is_that_of_the_weights_in_every_stretch(weights):
    mixture = Mixture(weights)
    shares = np.array(weights) / sum(weights)
    turns = 3000
    pools, numbers = zip(*(mixture[turn] for turn in range(turns)), strict=True)
    counts = np.zeros(len(weights))
    for turn, (pool, number) in enumerate(zip(pools, numbers, strict=True), 1):
        assert number == counts[pool]  # nothing of a pool is left out
        counts[pool] += 1
        if turn % 100 == 0:
            assert (np.abs(counts - shares * turn) <= len(weights)).all()


def test_a_mixture_goes_on_in_the_same_way_after_its_period():
    mixture = Mixture([1.0, 2.0, 7.3])
    counts = [0, 0, 0]
    for turn in range(220_000):
        pool, number = mixture[turn]
        assert number == counts[pool]
        counts[pool] += 1
    shares = np.array([1.0, 2.0, 7.3]) / 10.3
    assert np.abs(np.array(counts) / 220_000 / shares - 1).max() < 1e-3


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_has_the_whole_mixture(world_size):
    """With documents dealt out one by one, two ranks and equal weights make a source each."""
    pools = [pool_of(500, source="a"), pool_of(300, source="b"), pool_of(90, 2.0, source="c")]
    for rank in range(world_size):
        found = places(islice(stream_of(pools, rank, world_size), 400))
        assert Counter(source for source, _ in found) == {"a": 100, "b": 100, "c": 200}


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(sizes, st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_ranks_together_go_through_every_pool_without_repeating(pool_sizes, world_size):
    pools = [pool_of(size, 1.0 + i, source=str(i)) for i, size in enumerate(pool_sizes)]
    turns = 60
    found = Counter(
        place
        for rank in range(world_size)
        for place in places(islice(stream_of(pools, rank, world_size), turns))
    )
    for i, size in enumerate(pool_sizes):
        seen = [found[str(i), 3 * row] for row in range(size)]
        assert max(seen) - min(seen) <= 1


@given(sizes, st.integers(1, 4), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=60)
def test_another_number_of_ranks_loses_and_repeats_nothing(pool_sizes, old, new, data):
    """Ranks may stand at different documents; of one pool and of a mixture."""
    rows = {str(i): np.arange(size) * 3 for i, size in enumerate(pool_sizes)}
    single = [Pool(rows, 1.0, "k")]
    found, streams = [], [stream_of(single, rank, old, repeat=False) for rank in range(old)]
    for count in (old, new, old):
        for stream in streams:
            found += places(islice(stream, data.draw(st.integers(0, 12))))
        states = json.loads(json.dumps([stream.get_state() for stream in streams]))
        streams = [stream_of(single, rank, count, repeat=False) for rank in range(count)]
        for stream, state in zip(streams, reshard_stream(states, count), strict=True):
            stream.set_state(state)
    left = sum(stream.remaining for stream in streams)
    rest = [place for stream in streams for place in places(stream)]
    assert len(rest) == left
    assert Counter(found + rest) == {(s, r): 1 for s, all_ in rows.items() for r in all_.tolist()}


@given(st.integers(1, 4), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=60)
def test_a_mixture_shared_out_anew_repeats_nothing_within_a_pass(old, new, data):
    pools = [pool_of(400, 1.0, source="a"), pool_of(400, 2.5, source="b")]
    streams = [stream_of(pools, rank, old) for rank in range(old)]
    found = [p for s in streams for p in places(islice(s, data.draw(st.integers(0, 20))))]
    states = reshard_stream([stream.get_state() for stream in streams], new)
    for rank, state in enumerate(states):
        stream = stream_of(pools, rank, new)
        stream.set_state(state)
        found += places(islice(stream, len(state["owed"]) + 20))
    assert max(Counter(found).values()) == 1
    # Without a gap: what was shown is the beginning of each pool's order.
    for pool, source in zip(pools, "ab", strict=True):
        shown = {row for name, row in found if name == source}
        numbers = [n for n in range(400) if pool[n].row in shown]
        assert len(numbers) == len(shown)
        assert not numbers or max(numbers) - len(numbers) < 2 * new


def test_readers_change_nothing_and_are_ahead():
    pools, read = [pool_of(5000)], []

    def note(source, row):
        read.append(row)
        return np.array([row])

    with ThreadPoolExecutor(3) as readers:
        stream = DocumentStream(pools, True, note, 0, 1, readers)
        found = places(islice(stream, 600))
    assert found == places(islice(stream_of(pools), 600))
    later = {pool_of(5000)[n].row for n in range(600, 800)}
    assert later <= set(read)


def test_nothing_comes_of_nothing():
    assert stream_of([], repeat=False).remaining == 0
    assert list(stream_of([], repeat=True)) == []


def test_what_goes_wrong_when_reading_ahead_is_raised():
    with ThreadPoolExecutor(1) as readers:
        stream = stream_of([pool_of(2000)], readers=readers)
        turn, ahead = stream._touch, []

        def broken(first):
            ahead.append(first)
            raise OSError("the disk is gone")

        stream._touch = broken
        next(stream)
        readers.submit(lambda: None).result()  # what was asked for is over
        stream._touch = turn
        with pytest.raises(OSError, match="the disk is gone"):
            list(islice(stream, 100))
    assert ahead == [256]
