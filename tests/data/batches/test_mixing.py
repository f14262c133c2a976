"""Pools, mixtures and streams: no document is lost or repeated; every rank has the mixture."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moma.data.batches.mixing import DocumentPool, DocumentStream, mix_pools, reshard_stream


def pool_of(size, weight=1.0, key="k", source="a"):
    return DocumentPool({source: np.arange(size) * 3}, weight, key)


def fetch(source, row):
    return np.array([row])


def stream_of(pools, rank=0, world_size=1, repeat=True, readers=None):
    return DocumentStream(pools, repeat, fetch, rank, world_size, readers)


def locations(documents):
    return [(document.source, document.row) for document in documents]


# Both ways of shuffling: by table, and by grain.
@pytest.mark.parametrize("size", [1, 2, 10, 1000, (1 << 16) + 3])
def test_every_epoch_shows_a_pool_once_in_a_new_order(size):
    pool, other = pool_of(size), pool_of(size, key="other")
    first, second = ([pool[n][1] for n in range(size * p, size * (p + 1))] for p in (0, 1))
    assert sorted(first) == sorted(second) == list(range(0, 3 * size, 3))
    if size >= 10:
        assert first != second
        assert first != sorted(first)
        assert first[:100] != [other[n][1] for n in range(min(size, 100))]


def test_a_pool_of_several_sources_mixes_them():
    pool = DocumentPool({"a": np.arange(50), "b": np.arange(50)}, 1.0, "k")
    found = [pool[n] for n in range(100)]
    assert Counter(source for source, _ in found) == {"a": 50, "b": 50}
    assert len(set(found)) == 100
    assert 15 < sum(source == "a" for source, _ in found[:50]) < 35


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_every_stretch_has_the_shares_of_the_weights(weights):
    mixture = mix_pools(weights)
    shares = np.array(weights) / sum(weights)
    counts = np.zeros(len(weights))
    for draw in range(3000):
        counts[mixture[draw]] += 1
        if draw % 100 == 99:
            assert (np.abs(counts - shares * (draw + 1)) <= len(weights)).all()


@pytest.mark.parametrize("weights", [[1.0, 2.0, 7.3], [1.0, 1.009], [3.0, 2.991, 3.006]])
def test_nearly_equal_weights_are_distinguished(weights):
    """grain would round weights down to hundredths of the smallest."""
    mixture = mix_pools(weights)
    counts = np.bincount([mixture[draw] for draw in range(100_000)])
    assert np.abs(counts / 100_000 / (np.array(weights) / sum(weights)) - 1).max() < 1e-4


@pytest.mark.parametrize(
    "weights",
    # The sum of the last two is infinite.
    [[1e-300, 1.0], [1.0, 1e300], [1e-320, 1e-310, 2.0], [1e308] * 3, [1e308, 1e308, 1.0]],
)
def test_extreme_weights_still_draw_from_every_pool(weights):
    mixture = mix_pools(weights)
    counts = np.bincount([mixture[draw] for draw in range(105_000)], minlength=len(weights))
    likely = np.array(weights) == max(weights)
    assert counts[likely].min() > 104_500 / likely.sum() and counts.min() > 0


def test_a_stream_can_be_restored_at_any_document():
    pools = [pool_of(30, 1.0, source="a"), pool_of(50, 2.5, source="b")]
    whole = locations(islice(stream_of(pools, 1, 2), 150))
    stream = stream_of(pools, 1, 2)
    for taken in range(100):
        state = json.loads(json.dumps(stream.get_state()))
        restored = stream_of(pools, 1, 2)
        next(restored)
        restored.set_state(state)
        assert locations(islice(restored, 50)) == whole[taken : taken + 50]
        next(stream)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_has_the_whole_mixture(world_size):
    """Not a source each, as two ranks that take single documents in turn would have."""
    pools = [pool_of(500, source="a"), pool_of(300, source="b"), pool_of(90, 2.0, source="c")]
    for rank in range(world_size):
        found = locations(islice(stream_of(pools, rank, world_size), 400))
        assert Counter(source for source, _ in found) == {"a": 100, "b": 100, "c": 200}


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(sizes, st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_ranks_together_go_through_every_pool_without_repeating(pool_sizes, world_size):
    pools = [pool_of(size, 1.0 + i, source=str(i)) for i, size in enumerate(pool_sizes)]
    turns = 60
    found = Counter(
        location
        for rank in range(world_size)
        for location in locations(islice(stream_of(pools, rank, world_size), turns))
    )
    for i, size in enumerate(pool_sizes):
        seen = [found[str(i), 3 * row] for row in range(size)]
        assert max(seen) - min(seen) <= 1


@given(sizes, st.integers(1, 4), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=60)
def test_another_number_of_ranks_loses_and_repeats_nothing(pool_sizes, old, new, data):
    """Ranks may have taken different numbers of documents."""
    rows = {str(i): np.arange(size) * 3 for i, size in enumerate(pool_sizes)}
    single = [DocumentPool(rows, 1.0, "k")]
    found, streams = [], [stream_of(single, rank, old, repeat=False) for rank in range(old)]
    for count in (old, new, old):
        for stream in streams:
            found += locations(islice(stream, data.draw(st.integers(0, 12))))
        states = json.loads(json.dumps([stream.get_state() for stream in streams]))
        streams = [stream_of(single, rank, count, repeat=False) for rank in range(count)]
        for stream, state in zip(streams, reshard_stream(states, count), strict=True):
            stream.set_state(state)
    left = sum(stream.remaining for stream in streams)
    rest = [location for stream in streams for location in locations(stream)]
    assert len(rest) == left
    assert Counter(found + rest) == {(s, r): 1 for s, all_ in rows.items() for r in all_.tolist()}


@given(st.integers(1, 4), st.integers(1, 4), st.data())
@settings(deadline=None, max_examples=60)
def test_a_resharded_mixture_repeats_nothing_within_an_epoch(old, new, data):
    pools = [pool_of(400, 1.0, source="a"), pool_of(400, 2.5, source="b")]
    streams = [stream_of(pools, rank, old) for rank in range(old)]
    found = [p for s in streams for p in locations(islice(s, data.draw(st.integers(0, 20))))]
    states = reshard_stream([stream.get_state() for stream in streams], new)
    for rank, state in enumerate(states):
        stream = stream_of(pools, rank, new)
        stream.set_state(state)
        found += locations(islice(stream, len(state["leftover"]) + 20))
    assert max(Counter(found).values()) == 1
    # No gaps: what was shown is the beginning of each pool's order.
    for pool, source in zip(pools, "ab", strict=True):
        shown = {row for name, row in found if name == source}
        numbers = [n for n in range(400) if pool[n][1] in shown]
        assert len(numbers) == len(shown)
        assert not numbers or max(numbers) - len(numbers) < 2 * new


def test_readers_read_ahead_and_change_nothing():
    pools, read = [pool_of(5000)], []

    def fetch_and_record(source, row):
        read.append(row)
        return np.array([row])

    with ThreadPoolExecutor(3) as readers:
        stream = DocumentStream(pools, True, fetch_and_record, 0, 1, readers)
        found = locations(islice(stream, 600))
    assert found == locations(islice(stream_of(pools), 600))
    later = {pool_of(5000)[n][1] for n in range(600, 800)}
    assert later <= set(read)


def test_a_stream_without_pools_is_empty():
    assert stream_of([], repeat=False).remaining == 0
    assert list(stream_of([], repeat=True)) == []


def test_an_error_of_a_reader_is_raised():
    """Of a document that is read ahead and not yet taken."""
    pool = pool_of(2000)
    taken = {pool[number][1] for number in range(200)}

    def broken_later(source, row):
        if row not in taken:
            raise OSError("the disk is gone")
        return np.array([row])

    with ThreadPoolExecutor(1) as readers:
        stream = DocumentStream([pool], True, broken_later, 0, 1, readers)
        next(stream)
        readers.submit(lambda: None).result()  # waits for the first read
        with pytest.raises(OSError, match="the disk is gone"):
            list(islice(stream, 100))


def test_readers_wait_while_leftover_documents_are_read():
    """They stay a fixed number of documents ahead."""
    read: set[int] = set()

    def fetch_and_record(source, row):
        read.add(row)
        return np.array([row])

    state = {"base": [1000], "taken": [0], "leftover": [[0, number] for number in range(500)]}
    with ThreadPoolExecutor(1) as readers:
        stream = DocumentStream([pool_of(20_000)], True, fetch_and_record, 0, 1, readers)
        stream.set_state(state)
        found = locations(islice(stream, 501))
    pool = pool_of(20_000)
    assert found == [*(pool[number] for number in range(500)), pool[1000]]
    assert read <= {pool[number][1] for number in [*range(500), 1000, *range(1256, 1288)]}
