"""Encoded shards → micro-batches: mixing, sharing out between ranks, and packing.

    shards of each source → documents with and without pictures → shuffled, repeated
                          → mixed by weight, once with, once without pictures (grain)
                          → this rank's samples, i ≡ rank (mod world size) → `Packer` → `Batch`

A sample is a number: where it leads is decided by the seed alone. So an iterator's state is two
sample numbers, and the references of the documents that are open.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from pydantic import Field, model_validator

from moma.data.documents import unit_hash
from moma.data.packing import Batch, Encoded, Packer, picture_budget
from moma.data.shards import Encoders, Shard, Shards, open_shards
from moma.data.sources import AnySource
from moma.errors import UserError
from moma.recipe import Config
from moma.vocabulary import Vocabulary


class DataConfig(Config):
    """What a model is trained on, and how it is cut into micro-batches.

    Attributes:
        path: folder of the prepared data: tokenizers, and the shards of each source.
        tokenizers: a prepared folder or a run whose tokenizer and codec are used; left out, they
            are trained on the sources.
        rows: rows of a micro-batch, the share of one rank in one step (B).
        row_length: tokens of a row (S).
        picture_share: share of a micro-batch's tokens that are image codes.
        held_out: share of the documents kept from training, where a source does not decide it.
        max_rejected: share of a source's rows that may be unusable before `prepare` stops.
        shard_tokens: tokens after which `prepare` begins another file of shards.
        sources: where documents come from; a source's weight counts documents, among the
            documents with pictures and among those without.
    """

    path: Path
    tokenizers: Path | None = None
    rows: int = Field(ge=1)
    row_length: int = Field(ge=2)
    picture_share: float = Field(ge=0, le=1)
    held_out: float = Field(default=0.02, ge=0, lt=1)
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    shard_tokens: int = Field(default=2**25, ge=1)
    sources: tuple[AnySource, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several sources are named {', '.join(twice)}; give each a 'name'")
        return self

    def folder(self, name: str) -> Path:
        """Folder of a source's shards."""
        return self.path / "shards" / name


class Batches(grain.DatasetIterator[Batch]):
    """The micro-batches of one rank, in an order that the seed decides.

    An iterator whose state can be saved and restored; grain's prefetch iterators can stand around
    it. A single pass (`repeat=False`) shows every document once, up to its last micro-batches,
    which may hold fewer pictures, and padding.
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
            UserError: shards are missing or do not suit the vocabulary, the picture share is no
                whole number of pictures, or no document has the pictures that it asks for.
        """
        super().__init__()
        self._repeat = split == "train" if repeat is None else repeat
        self._world_size = world_size
        pictures = picture_budget(config.rows, config.row_length, config.picture_share, vocabulary)
        encoders = Encoders.load(config.path)
        opened = {
            source.name: open_shards(config.folder(source.name), vocabulary, encoders)
            for source in config.sources
        }
        self._shards = {name: shards.splits[split] for name, shards in opened.items()}
        weights = {source.name: source.weight for source in config.sources}
        self._digest = _digest(opened, weights, seed, split, self._repeat)
        with_pictures, without = (
            _mix(self._shards, weights, f"{seed} {split} {pictured}", pictured, self._repeat)
            for pictured in (True, False)
        )
        if self._repeat:
            _check_supply(config, pictures, with_pictures, without)
        self._pictured = _Stream(with_pictures if pictures else None, self._fetch, rank, world_size)
        self._text = _Stream(without, self._fetch, rank, world_size)
        self._packer = Packer(
            config.rows, config.row_length, pictures, vocabulary, self._pictured, self._text
        )

    def __next__(self) -> Batch:
        """The next micro-batch; at the end of a single pass, StopIteration.

        Raises:
            UserError: the documents bring more text with each picture than the rows have room for.
        """
        if not self.unreached_documents:
            raise StopIteration
        return self._packer.pack()

    @property
    def unreached_documents(self) -> int:
        """Documents that a single pass has still to show to their end, on this rank."""
        return self._pictured.remaining + self._text.remaining + sum(self._packer.open_documents)

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands; ready for JSON."""
        return {
            "data": self._digest,
            "world_size": self._world_size,
            "pictured": self._pictured.get_state(),
            "text": self._text.get_state(),
            "packer": self._packer.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where another iterator stood.

        Args:
            state: from `get_state`, of the same rank; from `share_out` if their number changed.

        Raises:
            UserError: the state belongs to other data or to another number of ranks.
        """
        if state["data"] != self._digest:
            raise UserError(
                "the saved data state belongs to other documents: sources, weights, shards or seed "
                "have changed; restore them, or begin the data anew"
            )
        if state["world_size"] != self._world_size:
            raise UserError(
                f"the saved data state is one of {state['world_size']} ranks, but there are "
                f"{self._world_size}; share the states out anew before loading one"
            )
        self._pictured.set_state(state["pictured"])
        self._text.set_state(state["text"])
        self._packer.set_state(state["packer"], self._fetch)

    def _fetch(self, source: str, row: int) -> np.ndarray:
        """Ids of a document, unsigned integers of shape [tokens]."""
        return self._shards[source].ids(row)


def share_out(states: Sequence[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Turn the states of all ranks into the states of another number of ranks.

    Nothing is skipped or repeated: open documents are dealt out, and samples that some ranks were
    still to read while others had gone further are read first.

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
        key: _share_out_stream([state[key] for state in states], world_size)
        for key in ("pictured", "text")
    }
    return [
        {
            "data": states[0]["data"],
            "world_size": world_size,
            "pictured": streams["pictured"][rank],
            "text": streams["text"][rank],
            "packer": {
                "packed": packers[0]["packed"],
                "waiting": waiting[rank::world_size],
                "tails": tails[rank::world_size],
            },
        }
        for rank in range(world_size)
    ]


def _share_out_stream(states: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    furthest = max(state["next"] for state in states)
    owed = sorted(
        sample
        for state in states
        for sample in (*state["owed"], *range(state["next"], furthest, len(states)))
    )
    return [
        {"next": furthest + (rank - furthest) % world_size, "owed": owed[rank::world_size]}
        for rank in range(world_size)
    ]


class _Place(NamedTuple):
    source: str
    row: int


class _Rows(Sequence[_Place]):
    """The places of some documents of one shard; random access for grain."""

    def __init__(self, source: str, rows: np.ndarray) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return _Place(self._source, int(self._rows[index]))


def _mix(
    shards: dict[str, Shard], weights: dict[str, float], key: str, pictured: bool, repeat: bool
) -> grain.MapDataset[_Place] | None:
    """The places of all documents with (or without) pictures; None if there are none."""
    parts, shares = [], []
    for name, shard in shards.items():
        rows = np.flatnonzero((shard.pictures > 0) == pictured)
        if len(rows):
            part = grain.MapDataset.source(_Rows(name, rows)).shuffle(_seed(f"{key} {name}"))
            parts.append(part.repeat() if repeat else part)
            shares.append(weights[name])
    if not parts:
        return None
    if repeat:
        return grain.MapDataset.mix(parts, shares)
    # A single pass shows every document once: weights have nothing to decide.
    return grain.MapDataset.concatenate(parts).shuffle(_seed(key))


def _seed(key: str) -> int:
    return int(unit_hash(key) * 2**31)


def _check_supply(
    config: DataConfig,
    pictures: int,
    with_pictures: grain.MapDataset | None,
    without: grain.MapDataset | None,
) -> None:
    names = ", ".join(source.name for source in config.sources)
    if pictures and with_pictures is None:
        raise UserError(
            f"picture_share is {config.picture_share:g}, but no document of {names} has a picture; "
            "add a source of pictures or set picture_share to 0"
        )
    if not pictures and without is None:
        raise UserError(
            f"picture_share is 0, but every document of {names} has a picture; "
            "add a source of text or raise picture_share"
        )


class _Stream(Iterator[Encoded]):
    """One rank's samples of a mixture: i ≡ rank (mod world size)."""

    def __init__(
        self,
        places: grain.MapDataset[_Place] | None,
        fetch: Callable[[str, int], np.ndarray],
        rank: int,
        world_size: int,
    ) -> None:
        self._places, self._fetch, self._world_size = places, fetch, world_size
        self._length = 0 if places is None else min(len(places), sys.maxsize)
        self._next = rank
        self._owed: list[int] = []  # samples before `_next` that a former rank left over

    @property
    def remaining(self) -> int:
        """Documents to come."""
        return len(self._owed) + len(range(self._next, self._length, self._world_size))

    def __next__(self) -> Encoded:
        if self._owed:
            sample = self._owed.pop(0)
        elif self._next < self._length:
            sample = self._next
            self._next += self._world_size
        else:
            raise StopIteration
        assert self._places is not None
        place = self._places[sample]
        return Encoded(place.source, place.row, self._fetch(place.source, place.row))

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, "owed": list(self._owed)}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._owed = state["next"], list(state["owed"])


def _digest(
    opened: dict[str, Shards], weights: dict[str, float], seed: int, split: str, repeat: bool
) -> str:
    """Equal when the same samples lead to the same documents."""
    infos = {name: shards.info.model_dump(mode="json") for name, shards in opened.items()}
    text = json.dumps([infos, weights, seed, split, repeat])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
