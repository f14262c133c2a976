"""Encoded shards → micro-batches: the documents of one rank, packed, in the background.

shards of each source → documents with images, documents without → two `DocumentStream`s
→ `Packer` → `Batch` → prefetched
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

from moma.data.batches.budget import Budget, ImageDocuments, check_documents, check_packing
from moma.data.batches.mixing import DocumentPool, DocumentStream, reshard_stream
from moma.data.batches.packing import Batch, Packer, reshard_packers
from moma.data.config import DataConfig
from moma.data.mapped_files import EncodedSplit
from moma.data.remote.fetching import provide_data
from moma.data.shards import Shards, open_sources
from moma.errors import UserError, list_names
from moma.vocabulary import Vocabulary

# Part of a saved state's fingerprint: increased when the same seed leads to other documents.
_ORDER_VERSION = 3
# Data and budgets that were checked in this process: the stages of a chain and their evaluation
# read the same data.
_CHECKED: set[tuple[Any, ...]] = set()


class Batches(grain.DatasetIterator[Batch]):
    """The micro-batches of one rank, in an order determined by the seed.

    Its state is how many documents the two streams have taken, and references to the documents
    that are partly packed. A single pass (`repeat=False`) shows every document once; its last
    micro-batches may hold fewer images, and padding.
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
            seed: determines the order of the documents.
            rank, world_size: this process's number, and how many share the documents.
            split: `train` or `held_out`.
            repeat: whether a source starts another epoch, in another order, after its last
                document; by default `train` repeats and `held_out` does not.

        Raises:
            UserError: shards are missing, or cannot meet what the recipe asks for.
        """
        self._readers: ThreadPoolExecutor | None = None
        super().__init__()
        self._repeat = split == "train" if repeat is None else repeat
        self._config, self._vocabulary, self._world_size = config, vocabulary, world_size
        self._budget = Budget.from_config(config, vocabulary)
        self._weights = {source.name: source.weight for source in config.sources}
        provide_data(config)
        opened = open_sources(config.path, self._weights, vocabulary)
        self._splits = {name: shards.splits[split] for name, shards in opened.items()}
        self._fingerprint = _fingerprint(opened, config, seed, split, self._repeat)
        self._pools = {
            with_images: self._make_pools(with_images, f"{seed} {split} {with_images}")
            for with_images in (True, False)
        }
        if self._repeat:
            self._check_budget()
            if not self._budget.images and not rank:
                _warn_unused_images(self._splits)
        if config.workers > 1:
            self._readers = ThreadPoolExecutor(config.workers - 1)
        self._with_images, self._text = (
            self._stream(with_images, rank, self._readers) for with_images in (True, False)
        )
        self._packer = self._make_packer(self._with_images, self._text)

    def __next__(self) -> Batch:
        """Return the next micro-batch; see `Packer.pack`."""
        if self.remaining_documents == 0:
            raise StopIteration
        return self._packer.pack()

    @property
    def remaining_documents(self) -> int | None:
        """Documents that a single pass has not shown completely; None if there is no end."""
        if self._repeat:
            return None
        streams = (self._with_images.remaining or 0) + (self._text.remaining or 0)
        return streams + self._packer.open_documents

    def close(self) -> None:
        """Stop the reader threads."""
        super().close()
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def get_state(self) -> dict[str, Any]:
        """Return the iterator's position; ready for JSON."""
        return {
            "fingerprint": self._fingerprint,
            "world_size": self._world_size,
            "with_images": self._with_images.get_state(),
            "text": self._text.get_state(),
            "packer": self._packer.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the state of another iterator.

        Args:
            state: from `get_state`, of the same rank; from `reshard` if the world size changed.

        Raises:
            UserError: the state belongs to other data or to another number of ranks.
        """
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "the saved data state belongs to other documents: sources, weights, shards or seed "
                "have changed; restore them, or begin another run with run=…"
            )
        if state["world_size"] != self._world_size:
            raise UserError(
                f"the saved data state is one of {state['world_size']} ranks, but there are "
                f"{self._world_size}; reshard the states of all ranks first"
            )
        self._with_images.set_state(state["with_images"])
        self._text.set_state(state["text"])
        self._packer.set_state(state["packer"], self._fetch)

    def _make_pools(self, with_images: bool, key: str) -> list[DocumentPool]:
        """Pools of the documents with images, or of those without."""
        rows_of = {
            name: rows.astype(np.min_scalar_type(len(split)))  # kept, for billions of documents
            for name, split in self._splits.items()
            if len(rows := np.flatnonzero((split.images > 0) == with_images))
        }
        if self._repeat:
            return [
                DocumentPool({name: rows}, self._weights[name], f"{key} {name}")
                for name, rows in rows_of.items()
            ]
        # A single pass shows every document once: weights have no effect.
        return [DocumentPool(rows_of, 1.0, key)] if rows_of else []

    def _stream(
        self, with_images: bool, rank: int, readers: ThreadPoolExecutor | None = None
    ) -> DocumentStream:
        # A budget of 0 leaves documents with images unused.
        pools = self._pools[with_images] if self._budget.images or not with_images else []
        return DocumentStream(pools, self._repeat, self._fetch, rank, self._world_size, readers)

    def _make_packer(self, with_images: DocumentStream, text: DocumentStream) -> Packer:
        sizes = self._config.micro_batch_size, self._config.sequence_length
        return Packer(*sizes, self._budget.images, self._vocabulary, with_images, text)

    def _fetch(self, source: str, row: int) -> np.ndarray:
        """Ids of a document, unsigned integers of shape [tokens]."""
        return self._splits[source].ids(row)

    def _check_budget(self) -> None:
        """Refuse documents that cannot meet the image budget."""
        with_images = [
            ImageDocuments(self._weights[name], split.lengths[rows], split.images[rows])
            for name, split in self._splits.items()
            if len(rows := np.flatnonzero(split.images))
        ]
        has_text, names = bool(self._pools[False]), list_names(self._weights)
        text = check_documents(self._budget, with_images, has_text, names, self._world_size)
        checked = self._config.path, self._fingerprint, self._budget, self._config.max_padding
        if self._budget.images and (*checked, self._world_size) not in _CHECKED:
            # Rank 0's micro-batches, on every rank: either all ranks refuse or none does.
            packer = self._make_packer(self._stream(True, 0), self._stream(False, 0))
            check_packing(self._budget, text, self._config.max_padding, packer)
            _CHECKED.add((*checked, self._world_size))


def prefetch(batches: Batches, config: DataConfig) -> grain.DatasetIterator[Batch]:
    """Return the same micro-batches, made in the background if `data.workers` > 0; to be closed.

    Its state is that of the micro-batches taken, not of those prefetched.
    """
    if not config.workers:
        return batches
    return ThreadPrefetchDatasetIterator(batches, config.prefetch)


def reshard(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Turn the states of all ranks into the states of another number of ranks.

    No document is skipped or repeated: those that are partly packed are split over the new ranks,
    and those that some ranks have not reached, while others have gone further, are read first.

    Args:
        states: `Batches.get_state()` of every rank, all after the same step.
        world_size: the new number of ranks; if it is the old one, the states stay as they are.
    """
    if len(states) == world_size:
        return list(states)
    streams = {
        key: reshard_stream([state[key] for state in states], world_size)
        for key in ("with_images", "text")
    }
    packers = reshard_packers([state["packer"] for state in states], world_size)
    return [
        {
            "fingerprint": states[0]["fingerprint"],
            "world_size": world_size,
            **{key: parts[rank] for key, parts in streams.items()},
            "packer": packers[rank],
        }
        for rank in range(world_size)
    ]


def _warn_unused_images(splits: Mapping[str, EncodedSplit]) -> None:
    """Print to standard error which documents are unused if `image_share` is 0."""
    images = {name: split.images[split.images > 0] for name, split in splits.items()}
    images = {name: counts for name, counts in images.items() if len(counts)}
    if not images:
        return
    documents, total = sum(map(len, images.values())), sum(map(len, splits.values()))
    print(
        f"note: image_share is 0, so {documents:,} of the {total:,} training documents, those with "
        f"images ({sum(map(np.sum, images.values())):,} in {list_names(images)}), are left out, "
        "their text too",
        file=sys.stderr,
    )


def training_fingerprint(config: DataConfig, vocabulary: Vocabulary, seed: int) -> str:
    """Return the `fingerprint` in the state of `Batches` that train on this data.

    Raises:
        UserError: shards are missing.
    """
    provide_data(config)
    opened = open_sources(config.path, [source.name for source in config.sources], vocabulary)
    return _fingerprint(opened, config, seed, "train", repeat=True)


def _fingerprint(
    opened: dict[str, Shards], config: DataConfig, seed: int, split: str, repeat: bool
) -> str:
    """Return a value that is equal if the same state leads to the same documents."""
    weights = {source.name: source.weight for source in config.sources}
    infos = {name: shards.info.model_dump(mode="json") for name, shards in opened.items()}
    text = json.dumps([_ORDER_VERSION, infos, weights, seed, split, repeat])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
