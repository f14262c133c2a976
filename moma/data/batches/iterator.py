"""EncodedDocument shards → micro-batches: the documents of a rank, packed, and prepared ahead.

    shards of each source → documents with and without images → two `DocumentStream`s (`mixing.py`)
                          → `Packer` → `Batch` → prepared ahead in the background

The seed alone decides which documents a stream yields. So an iterator's state is how far the two
streams are, and the references of the documents that are open.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from grain.experimental import ThreadPrefetchDatasetIterator

from moma.data.batches.mixing import DocumentStream, Pool, reshard_stream
from moma.data.batches.packing import Batch, Packer, image_budget
from moma.data.batches.supply import Demand, ImageDocuments, check_supply
from moma.data.config import DataConfig
from moma.data.shards import Encoders, Shard, Shards, open_shards
from moma.errors import UserError
from moma.vocabulary import Vocabulary

# Part of the digest of a saved state: raised when the same seed leads to other documents.
_ORDER = 2


class Batches(grain.DatasetIterator[Batch]):
    """The micro-batches of one rank, in an order that the seed decides.

    An iterator whose state can be saved and restored; `prefetch` makes them in the
    background. A single pass (`repeat=False`) shows every document once, up to its last
    micro-batches, which may hold fewer images, and padding.
    """

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        split: str = "train",
        repeat: bool | None = None,
    ) -> None:
        """Open the shards.

        Args:
            config: the recipe's data section.
            vocabulary: the ids.
            seed: decides the order of the documents.
            rank: this process's number among `world_size`.
            world_size: number of processes that share the documents.
            split: `train` or `held_out`.
            repeat: whether to begin anew, in another order, when a source has been shown whole;
                by default `train` repeats and `held_out` does not.

        Raises:
            UserError: shards are missing, or cannot meet what the recipe asks for.
        """
        self._readers: ThreadPoolExecutor | None = None
        super().__init__()
        self._repeat = split == "train" if repeat is None else repeat
        self._world_size = world_size
        images = image_budget(
            config.micro_batch_size, config.sequence_length, config.image_share, vocabulary
        )
        opened = _open(config, vocabulary)
        self._shards = {name: shards.splits[split] for name, shards in opened.items()}
        weights = {source.name: source.weight for source in config.sources}
        self._digest = _digest(opened, weights, seed, split, self._repeat)
        rows_of = {with_images: self._rows(with_images) for with_images in (True, False)}
        if self._repeat:
            self._check_supply(config, images, vocabulary, rows_of)
        if not images:
            rows_of[True] = {}
            if self._repeat and not rank:
                print(*_left_out(self._shards), sep="", end="", file=sys.stderr)
        if config.workers > 1:
            self._readers = ThreadPoolExecutor(config.workers - 1)
        self._with_images, self._text = (
            self._stream(
                _pools(
                    rows_of[with_images], weights, f"{seed} {split} {with_images}", self._repeat
                ),
                rank,
            )
            for with_images in (True, False)
        )
        self._packer = Packer(
            config.micro_batch_size,
            config.sequence_length,
            images,
            vocabulary,
            self._with_images,
            self._text,
        )

    def __next__(self) -> Batch:
        """The next micro-batch; at the end of a single pass, StopIteration.

        Raises:
            UserError: the documents bring more text with each image than the sequences have room
            for.
        """
        if self.remaining_documents == 0:
            raise StopIteration
        return self._packer.pack()

    @property
    def remaining_documents(self) -> int | None:
        """Documents that a single pass has still to show to their end; None if it has no end."""
        if self._repeat:
            return None
        streams = (self._with_images.remaining or 0) + (self._text.remaining or 0)
        return streams + sum(self._packer.open_documents)

    def close(self) -> None:
        """End the threads that read ahead."""
        super().close()
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands; ready for JSON."""
        return {
            "data": self._digest,
            "world_size": self._world_size,
            "with_images": self._with_images.get_state(),
            "text": self._text.get_state(),
            "packer": self._packer.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where another iterator stood.

        Args:
            state: from `get_state`, of the same rank; from `reshard` if their number changed.

        Raises:
            UserError: the state belongs to other data or to another number of ranks.
        """
        if state["data"] != self._digest:
            raise UserError(
                "the saved data state belongs to other documents: sources, weights, shards or seed "
                "have changed; restore them"
            )
        if state["world_size"] != self._world_size:
            raise UserError(
                f"the saved data state is one of {state['world_size']} ranks, but there are "
                f"{self._world_size}; share the states out anew before loading one"
            )
        self._with_images.set_state(state["with_images"])
        self._text.set_state(state["text"])
        self._packer.set_state(state["packer"], self._fetch)

    def _rows(self, with_images: bool) -> dict[str, np.ndarray]:
        """Of each source that has some, the rows with images, or those without."""
        return {
            name: rows
            for name, shard in self._shards.items()
            if len(rows := np.flatnonzero((shard.images > 0) == with_images))
        }

    def _stream(self, pools: list[Pool], rank: int) -> DocumentStream:
        return DocumentStream(
            pools, self._repeat, self._fetch, rank, self._world_size, self._readers
        )

    def _fetch(self, source: str, row: int) -> np.ndarray:
        """Ids of a document, unsigned integers of shape [tokens]."""
        return self._shards[source].ids(row)

    def _check_supply(
        self,
        config: DataConfig,
        images: int,
        vocabulary: Vocabulary,
        rows_of: dict[bool, dict[str, np.ndarray]],
    ) -> None:
        demand = Demand(
            config.micro_batch_size,
            config.sequence_length,
            images,
            vocabulary.codes_per_image,
            config.max_padding,
            self._world_size,
        )
        with_images = [
            ImageDocuments(source.name, source.weight, self._shards[source.name], rows)
            for source in config.sources
            if (rows := rows_of[True].get(source.name)) is not None
        ]
        names = ", ".join(source.name for source in config.sources)
        check_supply(demand, with_images, bool(rows_of[False]), names)


def prefetch(batches: Batches, config: DataConfig) -> grain.DatasetIterator[Batch]:
    """The same micro-batches, made in the background if the recipe has workers; to be closed.

    The state is that of the micro-batches taken, not of those that lie ready.
    """
    if not config.workers:
        return batches
    return ThreadPrefetchDatasetIterator(batches, config.prefetch)


def reshard(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Turn the states of all ranks into the states of another number of ranks.

    Nothing is skipped or repeated: open documents are dealt out, and documents that some ranks
    were still to read while others had gone further are read first.

    Args:
        states: `Batches.get_state()` of every rank, all after the same step.
        world_size: number of ranks to go on with.
    """
    packers = [state["packer"] for state in states]
    waiting, tails = (
        [reference for packer in packers for reference in packer[key]]
        for key in ("waiting", "tails")
    )
    streams = {
        key: reshard_stream([state[key] for state in states], world_size)
        for key in ("with_images", "text")
    }
    return [
        {
            "data": states[0]["data"],
            "world_size": world_size,
            "with_images": streams["with_images"][rank],
            "text": streams["text"][rank],
            "packer": {
                "packed": packers[0]["packed"],
                "waiting": waiting[rank::world_size],
                "tails": tails[rank::world_size],
            },
        }
        for rank in range(world_size)
    ]


def warn_unused_images(config: DataConfig, vocabulary: Vocabulary) -> None:
    """Say on standard error how much training without images leaves out; nothing if nothing."""
    opened = _open(config, vocabulary)
    shards = {name: one.splits["train"] for name, one in opened.items()}
    print(*_left_out(shards), sep="", end="", file=sys.stderr)


def _left_out(shards: Mapping[str, Shard]) -> list[str]:
    """A line if documents have images."""
    images = [shard.images[shard.images > 0] for shard in shards.values()]
    if not any(map(len, images)):
        return []
    found, of_all = sum(map(len, images)), sum(map(len, shards.values()))
    named = ", ".join(n for n, found in zip(shards, images, strict=True) if len(found))
    return [
        f"note: image_share is 0, so {found:,} of the {of_all:,} training documents, those with "
        f"images ({sum(int(one.sum()) for one in images):,} in {named}), are left out, their "
        "text too\n"
    ]


def _open(config: DataConfig, vocabulary: Vocabulary) -> dict[str, Shards]:
    encoders = Encoders.load(config.path)
    return {
        source.name: open_shards(config.folder(source.name), vocabulary, encoders)
        for source in config.sources
    }


def _pools(
    rows_of: dict[str, np.ndarray], weights: dict[str, float], key: str, repeat: bool
) -> list[Pool]:
    if repeat:
        return [
            Pool({name: rows}, weights[name], f"{key} {name}") for name, rows in rows_of.items()
        ]
    # A single pass shows every document once: weights have nothing to decide.
    return [Pool(rows_of, 1.0, key)] if rows_of else []


def _digest(
    opened: dict[str, Shards], weights: dict[str, float], seed: int, split: str, repeat: bool
) -> str:
    """Equal when the same samples lead to the same documents."""
    infos = {name: shards.info.model_dump(mode="json") for name, shards in opened.items()}
    text = json.dumps([_ORDER, infos, weights, seed, split, repeat])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
