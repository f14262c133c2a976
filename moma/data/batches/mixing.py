"""Which documents a rank reads, and in which order: shuffled, mixed by weight, shared out.

    documents of each source → `Pool`: in random order, another one in every pass
                             → mixed by weight: the k-th document of every rank is of the same pool
                             → `DocumentStream`: number j of a pool goes to rank j mod world size

A document's place follows from three numbers: pool, number within the pool, rank. So every rank
has the mixture that the weights ask for, and a stream's state is how many documents it has taken
of each pool.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from grain.experimental import index_shuffle

from moma.data.batches.packing import EncodedDocument
from moma.hashes import unit_hash

# Slots over which weights are rounded: a source's share is off by at most half a slot.
_SLOTS = 100_000
# Below it, grain's shuffle tries so many numbers in vain that a table is faster.
_SMALLEST_SHUFFLE = 1 << 16
# Documents are read so many turns ahead, by readers that take so many at once.
_READ_AHEAD, _READ_TOGETHER = 256, 32


class Location(NamedTuple):
    """Where a document lies: source, and row of the source's shard."""

    source: str
    row: int


class Pool:
    """Documents of one source or several, in a random order that the key decides."""

    def __init__(self, rows_of: dict[str, np.ndarray], weight: float, key: str) -> None:
        """Set up the pool.

        Args:
            rows_of: for each source the rows of its documents, integers of shape [documents].
            weight: how often the pool is drawn from, relative to others.
            key: decides the order.
        """
        self.weight = weight
        self._sources, self._rows = list(rows_of), list(rows_of.values())
        self._starts = np.cumsum([0, *map(len, self._rows)]).tolist()
        self._seed = int(unit_hash(key) * 2**31)
        self._table = lru_cache(maxsize=2)(self._order_of_pass)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> Location:
        """The place of a document; numbers beyond the last begin anew, in another order."""
        passes, at = divmod(number, len(self))
        if len(self) < _SMALLEST_SHUFFLE:
            at = self._table(passes)[at]
        else:
            seed = (self._seed + passes) % 2**32
            at = index_shuffle(at, max_index=len(self) - 1, seed=seed, rounds=4)
        source = bisect_right(self._starts, at) - 1
        return Location(self._sources[source], int(self._rows[source][at - self._starts[source]]))

    def _order_of_pass(self, passes: int) -> list[int]:
        order = np.random.default_rng((self._seed, passes)).permutation(len(self))
        return list(map(int, order))


class Mixture:
    """An endless sequence of pools in which each has the share that its weight asks for.

    In every stretch of it, not only on average: each pool's turns are evenly spaced.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Set up the sequence.

        Args:
            weights: of the pools; the smallest share that one can have is a slot of the period.
        """
        self._counts, self._pool, self._number = _period(tuple(weights))

    def __getitem__(self, turn: int) -> tuple[int, int]:
        """The pool whose turn it is, and how many turns it had before."""
        periods, at = divmod(turn, len(self._pool))
        pool = self._pool[at]
        return pool, periods * self._counts[pool] + self._number[at]


@lru_cache(maxsize=8)
def _period(weights: tuple[float, ...]) -> tuple[list[int], list[int], list[int]]:
    """Slots of each pool; for each slot the pool, and its number among the pool's slots."""
    shares = np.array(weights) / sum(weights)
    counts = np.maximum(np.round(shares * _SLOTS).astype(np.int64), 1)
    pool = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((number + 0.5) / counts[pool], kind="stable")
    return counts.tolist(), pool[order].tolist(), number[order].tolist()


class DocumentStream(Iterator[EncodedDocument]):
    """The documents of one rank."""

    def __init__(
        self,
        pools: Sequence[Pool],
        repeat: bool,
        fetch: Callable[[str, int], np.ndarray],
        rank: int,
        world_size: int,
        readers: Executor | None = None,
    ) -> None:
        """Set up the stream.

        Args:
            pools: what is mixed; a single one if the stream ends.
            repeat: whether to begin a pool anew when it has been shown whole.
            fetch: source and row → the document's ids.
            rank: this process's number among `world_size`.
            world_size: number of processes that share the documents.
            readers: threads that bring documents into memory before their turn comes.
        """
        self._pools, self._repeat, self._fetch = pools, repeat, fetch
        self._rank, self._world_size = rank, world_size
        self._mixture = Mixture([pool.weight for pool in pools]) if pools else None
        # Numbers below the base were given away before the number of ranks last changed.
        self._base = [0] * len(pools)
        self._taken = [0] * len(pools)
        self._turn = 0
        self._owed: list[list[int]] = []  # pool and number of what former ranks left below the base
        self._readers = readers
        self._touching: deque[Future[None]] = deque()

    @property
    def remaining(self) -> int | None:
        """Documents to come; None if there is no end."""
        if not self._pools:
            return 0
        if self._repeat:
            return None
        number = self._base[0] + self._taken[0] * self._world_size + self._rank
        return len(self._owed) + len(range(number, len(self._pools[0]), self._world_size))

    def __next__(self) -> EncodedDocument:
        if not self._owed and self.remaining == 0:
            raise StopIteration
        if self._readers and self._turn % _READ_TOGETHER == 0:
            while self._touching and self._touching[0].done():
                self._touching.popleft().result()  # or its error would be lost
            self._touching.append(self._readers.submit(self._touch, self._turn + _READ_AHEAD))
        if self._owed:
            pool, number = self._owed.pop(0)
        else:
            pool, number = self._at(self._turn)
            self._taken[pool] += 1
            self._turn += 1
        place = self._pools[pool][number]
        return EncodedDocument(*place, self._fetch(*place))

    def get_state(self) -> dict[str, Any]:
        """How many documents were taken of each pool; ready for JSON."""
        owed = [list(entry) for entry in self._owed]
        return {"base": list(self._base), "taken": list(self._taken), "owed": owed}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same pools and rank stood."""
        self._base, self._taken = list(state["base"]), list(state["taken"])
        self._owed = [
            [pool, number]
            for pool, number in state["owed"]
            # Beyond the end of a single pass nothing is owed.
            if self._repeat or number < len(self._pools[pool])
        ]
        self._turn = sum(self._taken)

    def _at(self, turn: int) -> tuple[int, int]:
        assert self._mixture is not None
        pool, before = self._mixture[turn]
        return pool, self._base[pool] + before * self._world_size + self._rank

    def _touch(self, turn: int) -> None:
        """Read the documents from a turn on, so that they are in memory when they are packed."""
        for pool, number in map(self._at, range(turn, turn + _READ_TOGETHER)):
            if self._repeat or number < len(self._pools[pool]):
                self._fetch(*self._pools[pool][number]).copy()


def reshard_stream(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Turn the states of one stream on all ranks into those of another number of ranks.

    Documents that some ranks were still to read while others had gone further are owed: they are
    dealt out, and read first.

    Args:
        states: `DocumentStream.get_state()` of every rank, in order.
        world_size: number of ranks to go on with.
    """
    base, ranks = states[0]["base"], len(states)
    furthest = max((state["taken"] for state in states), key=sum)
    owed = [entry for state in states for entry in state["owed"]]
    for rank, state in enumerate(states):
        for pool, (taken, end) in enumerate(zip(state["taken"], furthest, strict=True)):
            owed += [[pool, base[pool] + each * ranks + rank] for each in range(taken, end)]
    owed.sort(key=lambda entry: entry[1])
    new_base = [before + taken * ranks for before, taken in zip(base, furthest, strict=True)]
    return [
        {"base": new_base, "taken": [0] * len(base), "owed": owed[rank::world_size]}
        for rank in range(world_size)
    ]
