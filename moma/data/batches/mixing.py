"""Which documents a rank reads, and in which order: shuffled, mixed by weight, split over ranks.

    documents of each source → `DocumentPool`: in random order, another one in every epoch
                             → grain's mix: draw k of every rank is from the same pool
                             → `DocumentStream`: document j of a pool goes to rank j mod world size

So every rank has the mixture that the weights ask for, and a stream's state is the number of
documents that it has taken from each pool.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache
from itertools import count, islice
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from moma.data.batches.packing import EncodedDocument
from moma.data.documents import unit_hash

# The smallest share of the draws that a pool can have.
_MIN_SHARE = 1e-5
# A smaller pool is shuffled by a table: grain's shuffle rejects most numbers that it tries there.
_MIN_INDEX_SHUFFLE = 1 << 16
# Reader threads are this many documents ahead, and read this many per task.
_READ_AHEAD, _READ_CHUNK = 256, 32


class DocumentPool:
    """Documents of one or several sources, in a random order determined by a key."""

    def __init__(self, rows_of: dict[str, np.ndarray], weight: float, key: str) -> None:
        """Set up the pool.

        Args:
            rows_of: for each source the rows of its documents in the split, integers of shape
                [documents].
            weight: how often the pool is drawn from, relative to others.
            key: determines the order.
        """
        self.weight = weight
        self._sources, self._rows = list(rows_of), list(rows_of.values())
        self._starts = np.cumsum([0, *map(len, self._rows)]).tolist()
        self._seed = int(unit_hash(key) * 2**31)
        self._permutation_of_epoch = lru_cache(maxsize=2)(self._permutation)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> tuple[str, int]:
        """Return source and row at a position; past the end the next epoch begins."""
        epoch, index = divmod(number, len(self))
        if len(self) < _MIN_INDEX_SHUFFLE:
            index = self._permutation_of_epoch(epoch)[index]
        else:
            seed = (self._seed + epoch) % 2**32
            index = index_shuffle(index, max_index=len(self) - 1, seed=seed, rounds=4)
        source = bisect_right(self._starts, index) - 1
        row = self._rows[source][index - self._starts[source]]
        return self._sources[source], int(row)

    def _permutation(self, epoch: int) -> list[int]:
        return np.random.default_rng((self._seed, epoch)).permutation(len(self)).tolist()


def mix_pools(weights: Sequence[float]) -> grain.MapDataset[int]:
    """Return the pool that each draw is from: an endless sequence of indices into `weights`.

    A pool's draws are evenly spaced, so its share holds in every stretch, not only on average.

    Args:
        weights: of the pools; a share of the draws is at least 0.00001.
    """
    if len(weights) == 1:  # the common case of one source of text: nothing to mix
        return grain.MapDataset.range(1).repeat()
    relative = np.array(weights) / max(weights)
    shares = np.maximum(relative / relative.sum(), _MIN_SHARE)
    # grain rounds weights down to hundredths of the smallest. To have millionths instead, the pool
    # with the smallest weight is entered a second time, with a ten-thousandth of its share.
    smallest = int(shares.argmin())
    extra = shares[smallest] / 10_000
    entries = [*enumerate(shares), (smallest, extra)]
    return grain.MapDataset.mix(
        [grain.MapDataset.range(pool, pool + 1).repeat() for pool, _ in entries],
        [float(share) for _, share in entries],
    )


class DocumentStream(Iterator[EncodedDocument]):
    """The documents of one rank."""

    def __init__(
        self,
        pools: Sequence[DocumentPool],
        repeat: bool,
        fetch: Callable[[str, int], np.ndarray],
        rank: int,
        world_size: int,
        readers: Executor | None = None,
    ) -> None:
        """Set up the stream.

        Args:
            pools: what is mixed; a single one if the stream ends.
            repeat: whether a pool starts another epoch after its last document.
            fetch: source and row → the document's ids.
            rank, world_size: as for `Batches`.
            readers: threads that bring documents into memory before they are needed.
        """
        self._pools, self._repeat, self._fetch = pools, repeat, fetch
        self._rank, self._world_size, self._readers = rank, world_size, readers
        self._mixture = mix_pools([pool.weight for pool in pools]) if pools else None
        self.set_state({"base": [0] * len(pools), "taken": [0] * len(pools), "leftover": []})

    @property
    def remaining(self) -> int | None:
        """Number of documents to come; None if there is no end."""
        if not self._pools:
            return 0
        if self._repeat:
            return None
        number = self._number(0, self._taken[0])
        return len(self._leftover) + len(range(number, len(self._pools[0]), self._world_size))

    def __next__(self) -> EncodedDocument:
        if self.remaining == 0:
            raise StopIteration
        if self._leftover:
            pool, number = self._leftover.popleft()
        else:
            if self._readers and sum(self._taken) % _READ_CHUNK == 0:
                self._read_ahead(self._readers)
            pool, number = next(self._draws)
            self._taken[pool] += 1
        source, row = self._pools[pool][number]
        return EncodedDocument(source, row, self._fetch(source, row))

    def get_state(self) -> dict[str, Any]:
        """Return how many documents were taken from each pool; ready for JSON."""
        leftover = [list(entry) for entry in self._leftover]
        return {"base": list(self._base), "taken": list(self._taken), "leftover": leftover}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the state of another stream of the same pools and rank.

        Args:
            state: from `get_state` or `reshard_stream`: `base`, of each pool, how many documents
                were assigned before the world size last changed; `taken`, how many this rank has
                taken since; `leftover`, pool and number of each document assigned before that
                is still to be read.
        """
        self._base, self._taken = list(state["base"]), list(state["taken"])
        # A single pass has no documents past the end of the pool.
        self._leftover = deque(entry for entry in state["leftover"] if self._exists(*entry))
        # Twice the same draws: the documents to be taken, and those to be read ahead.
        self._draws, self._upcoming = self._draw(), islice(self._draw(), _READ_AHEAD, None)
        self._reading: deque[Future[None]] = deque()

    def _draw(self) -> Iterator[tuple[int, int]]:
        """Index of the pool and number of each document to come, without the leftover ones."""
        taken = list(self._taken)
        assert self._mixture is not None
        for draw in count(sum(taken)):
            pool = self._mixture[draw]
            yield pool, self._number(pool, taken[pool])
            taken[pool] += 1

    def _exists(self, pool: int, number: int) -> bool:
        return self._repeat or number < len(self._pools[pool])

    def _number(self, pool: int, taken: int) -> int:
        return self._base[pool] + taken * self._world_size + self._rank

    def _read_ahead(self, readers: Executor) -> None:
        while self._reading and self._reading[0].done():
            self._reading.popleft().result()  # raises the error of a failed read
        chunk = list(islice(self._upcoming, _READ_CHUNK))
        self._reading.append(readers.submit(self._read, chunk))

    def _read(self, chunk: list[tuple[int, int]]) -> None:
        for pool, number in chunk:
            if self._exists(pool, number):
                self._fetch(*self._pools[pool][number]).copy()


def reshard_stream(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Turn the states of one stream on all ranks into those of another number of ranks.

    Ranks may have taken different numbers of documents. Those that the others have yet to take, up
    to the furthest rank, become the leftover ones, which are read first.

    Args:
        states: `DocumentStream.get_state()` of every rank, in order.
    """
    base, ranks = states[0]["base"], len(states)
    furthest = max((state["taken"] for state in states), key=sum)
    leftover = [entry for state in states for entry in state["leftover"]]
    for rank, state in enumerate(states):
        for pool, (taken, end) in enumerate(zip(state["taken"], furthest, strict=True)):
            leftover += [[pool, base[pool] + draw * ranks + rank] for draw in range(taken, end)]
    leftover.sort(key=lambda entry: entry[1])
    new_base = [before + taken * ranks for before, taken in zip(base, furthest, strict=True)]
    return [
        {"base": new_base, "taken": [0] * len(base), "leftover": leftover[rank::world_size]}
        for rank in range(world_size)
    ]
