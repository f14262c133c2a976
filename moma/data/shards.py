"""Encoded shards on disk: what a source's folder holds, and how it is opened.

    shards/SOURCE/   shard.json       counts, and what the shards were made from
                     vocabulary.json  the ids
                     rejected.jsonl   documents that were rejected, with the reasons
                     train-00012-00003.arrow, …  file 3 of part 12 of the source

A row of an Arrow file is a document: `ids`, `images`, `name`. The files are memory-mapped.
`encode/part_writer.py` writes them.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
from pydantic import Field

from moma.data.mapped_files import DAMAGE, EncodedSplit, GetFile, Index, cached_files
from moma.data.provenance import Encoders, read_provenance
from moma.data.remote.manifest import CheckedChecksum, Name
from moma.data.remote.reading import (
    LINK_FILE,
    Link,
    RemoteFiles,
    load_index,
    read_indices,
    read_link,
)
from moma.errors import UserError, error_reason
from moma.files import UNFINISHED, Checksum, read_bounded
from moma.recipe import Config
from moma.runs import wrong_folder
from moma.vocabulary import Vocabulary

SPLITS = ("train", "held_out")

INFO_FILE = "shard.json"
ORIGIN_FILE = "origin.json"
PLAN_FILE = "plan.json"
VOCABULARY_FILE = "vocabulary.json"
REJECTED_FILE = "rejected.jsonl"
# Every file that moma writes into the folder of a source; the last alternative is of older data.
_NAMES = (ORIGIN_FILE, PLAN_FILE, LINK_FILE, INFO_FILE, VOCABULARY_FILE, REJECTED_FILE)
_OWN_FILE = re.compile(
    rf"({'|'.join(map(re.escape, _NAMES))}"
    rf"|(part|rejected|{'|'.join(SPLITS)})-\d+(-\d+)?\.(json|jsonl|arrow|npy)"
    rf"|({'|'.join(SPLITS)})\.npy)"
    rf"(\.[0-9a-f]+)?({re.escape(UNFINISHED)})?"
)

AnyConfig = TypeVar("AnyConfig", bound=Config)


class Counts(Config):
    """Documents of a split, and their tokens and images."""

    documents: int = 0
    tokens: int = 0
    images: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            images=self.images + other.images,
        )


class PartRecord(Config):
    """What is committed of a part of a source: consecutive documents, in one file of each split.

    Attributes:
        part: number of the part; None in older data, whose files are numbered through.
        file: number of the files among those of the part.
        is_last: whether they are the last ones of the part, which is then complete.
        first, stop: the range `first` … `stop` − 1 of the part's documents, rejected ones
            included, from 0.
        counts: counts of each split.
        rejected: number of rejected documents.
        dropped: number of dropped documents, by key of `clean`.
        dropped_images: number of images that were dropped of other documents, by key.
        checksums: size and SHA-256 of each file, by its name.
    """

    part: int | None = None
    file: int = 0
    is_last: bool = False
    first: int = 0
    stop: int = 0
    counts: dict[str, Counts] = dict.fromkeys(SPLITS, Counts())
    rejected: int = 0
    dropped: dict[str, int] = Field(default={})
    dropped_images: dict[str, int] = Field(default={})
    checksums: dict[Name, CheckedChecksum] = Field(default={})

    def __add__(self, following: "PartRecord") -> "PartRecord":
        return PartRecord(
            first=self.first,
            stop=self.stop + following.documents_read,
            counts={split: self.counts[split] + following.counts[split] for split in SPLITS},
            rejected=self.rejected + following.rejected,
            dropped=Counter(self.dropped) + Counter(following.dropped),
            dropped_images=Counter(self.dropped_images) + Counter(following.dropped_images),
        )

    @property
    def name(self) -> str:
        """What the names of its files end with."""
        return f"{self.part or 0:05}-{self.file:05}"

    @property
    def documents_read(self) -> int:
        """Number of documents, rejected ones included."""
        return self.stop - self.first

    @property
    def total(self) -> Counts:
        """Counts of all splits together."""
        return sum(self.counts.values(), Counts())


class ShardInfo(Config):
    """Counts of a source's shards, and what they were made from; stored as `shard.json`.

    Attributes:
        source: name of the source.
        source_fingerprint, vocabulary_fingerprint: fingerprints of the source's configuration and
            files, and of the vocabulary.
        encoders: fingerprints of the tokenizer and the codec.
        counts: counts of each split.
        rejected: number of rejected documents.
        dropped, dropped_images: as in `PartRecord`.
        parts: what the files hold, in the order of the documents; each has a file for every split
            of which it has documents.
    """

    source: str
    source_fingerprint: str
    vocabulary_fingerprint: str
    encoders: Encoders = Encoders()
    counts: dict[str, Counts] = dict.fromkeys(SPLITS, Counts())
    rejected: int = 0
    dropped: dict[str, int] = Field(default={})
    dropped_images: dict[str, int] = Field(default={})
    parts: tuple[PartRecord, ...] = ()

    @property
    def whole(self) -> PartRecord:
        """All parts as one."""
        stop = sum(part.documents_read for part in self.parts)
        return PartRecord(
            stop=stop,
            counts=self.counts,
            rejected=self.rejected,
            dropped=self.dropped,
            dropped_images=self.dropped_images,
        )

    def with_parts(self, parts: Sequence[PartRecord]) -> "ShardInfo":
        """Return the same origin with these parts."""
        whole = sum(parts, PartRecord())
        counts = whole.model_dump(exclude={"first", "stop", "counts"})
        return self.model_copy(update={**counts, "counts": whole.counts, "parts": tuple(parts)})

    def same_origin(self, other: "ShardInfo") -> bool:
        """Return whether both were made from the same documents with the same encoders."""
        return self.with_parts(()) == other.with_parts(())

    def files(self, folder: Path, split: str) -> list[Path]:
        """Return the Arrow files of a split, in the order of the documents."""
        return [
            folder / file_name(split, f"{number:05}" if part.part is None else part.name)
            for number, part in enumerate(self.parts)
            if part.counts[split].documents
        ]


@dataclass(frozen=True)
class Shards:
    """The shards of one source.

    Attributes:
        info: their counts and origin.
        splits: the encoded documents of each split, by its name in `SPLITS`.
    """

    info: ShardInfo
    splits: dict[str, EncodedSplit]


def open_sources(data: Path, names: Iterable[str], vocabulary: Vocabulary) -> dict[str, Shards]:
    """Open the shards of some sources of a data folder, by name; see `open_shards`."""
    require_data_folder(data)
    provenance = read_provenance(data)
    encoders = provenance.encoders if provenance else None
    folder, get_file = data / "shards", cached_files()
    return {name: open_shards(folder / name, vocabulary, encoders, get_file) for name in names}


def require_data_folder(folder: Path) -> None:
    """Raise `UserError` if a folder is not a data folder; the message describes what it is."""
    if not (folder / "shards").is_dir() and read_provenance(folder) is None:
        raise wrong_folder(folder, "data")


def require_own(*folders: Path) -> None:
    """Refuse to replace or delete folders with files that moma did not write."""
    for folder in filter(Path.exists, folders):
        names = sorted(os.listdir(folder)) if folder.is_dir() else [folder.name]
        foreign = next((name for name in names if not _OWN_FILE.fullmatch(name)), None)
        if foreign is not None:
            raise UserError(
                f"{folder}: has to be replaced, but moma did not write '{foreign}' there; "
                "move it away"
            )


def open_shards(
    folder: Path,
    vocabulary: Vocabulary,
    encoders: Encoders | None = None,
    get_file: GetFile | None = None,
) -> Shards:
    """Open the shards of one source, which must have been encoded with this vocabulary.

    Args:
        encoders: the tokenizer and codec; None accepts any.
        get_file: opens files, also those of other shards; see `cached_files`.

    Raises:
        UserError: they are missing, incomplete or damaged, or were encoded with others.
    """
    info = read_info(folder)
    if info is None:
        raise UserError(f"{folder}: no complete shards here; run `moma prepare`")
    again = "run `moma prepare` again or use the tokenizer and codec that it was encoded with"
    if info.vocabulary_fingerprint != vocabulary.fingerprint:
        theirs = Vocabulary.load(folder / VOCABULARY_FILE)
        raise UserError(
            f"{folder}: encoded with vocabulary {info.vocabulary_fingerprint}, not "
            f"{vocabulary.fingerprint}; they differ in {theirs.differences(vocabulary)}; {again}"
        )
    if encoders is not None and info.encoders != encoders:
        raise UserError(
            f"{folder}: encoded with another {info.encoders.differences(encoders)}; {again}"
        )
    return _open_files(folder, info, get_file or cached_files())


def open_unfinished(folder: Path) -> Shards:
    """Open what is committed in a folder of shards that `moma prepare` has not completed.

    Raises:
        UserError: there is nothing, or it is damaged.
    """
    origin = read_config(ShardInfo, folder / ORIGIN_FILE)
    found = (read_config(PartRecord, path) for path in sorted(folder.glob("part-*.json")))
    records = [record for record in found if record is not None and record.documents_read]
    if origin is None or not records:
        raise UserError(f"{folder}: nothing is complete yet; inspect it later")
    return _open_files(folder, origin.with_parts(records), cached_files())


def _open_files(folder: Path, info: ShardInfo, get_file: GetFile) -> Shards:
    link = read_link(folder)
    indices: dict[str, Index | None] = dict.fromkeys(SPLITS)
    if link is not None:
        checksums = {name: value for part in info.parts for name, value in part.checksums.items()}
        get_file = RemoteFiles(folder, link, checksums).get
        indices = {split: _index(folder, info, split, link, checksums) for split in SPLITS}
    try:
        splits = {
            split: EncodedSplit(info.files(folder, split), get_file, indices[split])
            for split in SPLITS
        }
        for split, encoded in splits.items():
            _check_files(folder, info, split, encoded)
    except DAMAGE as error:
        raise UserError(
            f"{folder}: damaged ({error_reason(error)}); delete it, run `moma prepare`"
        ) from error
    return Shards(info, splits)


def _index(
    folder: Path, info: ShardInfo, split: str, link: Link, checksums: Mapping[str, Checksum]
) -> Index | None:
    """The index of a split, saved or at the address; None if files are still to be uploaded."""
    path, files = folder / index_file(split), info.files(folder, split)
    if path.exists():
        lengths, images = load_index(path, path)
    elif any(file.exists() for file in files):
        return None
    else:
        lengths, images = read_indices(link, {file.name: checksums[file.name] for file in files})
    documents = [part.counts[split].documents for part in info.parts]
    if sum(documents) != len(lengths):
        raise UserError(f"{path}: damaged; remove {folder}, run the same command again")
    return Index([*filter(None, documents)], images, lengths, [])


def index_file(split: str) -> str:
    """Return the name of the file with lengths and images of all documents of a split."""
    return f"{split}.npy"


def shard_features(vocabulary: Vocabulary) -> datasets.Features:
    """Return the columns of shards: ids have the smallest type that holds the vocabulary."""
    smallest = np.min_scalar_type(vocabulary.size - 1)
    ids, images = datasets.List(datasets.Value(smallest.name)), datasets.Value("int32")
    return datasets.Features({"ids": ids, "images": images, "name": datasets.Value("string")})


def read_info(folder: Path) -> ShardInfo | None:
    """Return the info of a folder of shards; None if they are incomplete."""
    return read_config(ShardInfo, folder / INFO_FILE)


def read_config(schema: type[AnyConfig], path: Path) -> AnyConfig | None:
    """Read a configuration stored as JSON; None if the file is missing or is something else."""
    try:
        return schema.model_validate_json(read_bounded(path))
    except (OSError, ValueError):
        return None


def file_name(split: str, name: str) -> str:
    """Return the name of the Arrow file of a split; `name` is that of its record."""
    return f"{split}-{name}.arrow"


def file_origin(info: ShardInfo) -> dict[str, str]:
    """Return the origin that the metadata of a source's files records."""
    return {
        "source": info.source,
        "source_fingerprint": info.source_fingerprint,
        "vocabulary": info.vocabulary_fingerprint,
        **info.encoders.model_dump(),
    }


def _check_files(folder: Path, info: ShardInfo, split: str, encoded: EncodedSplit) -> None:
    """Refuse files of another origin and truncated files."""
    # With a saved index no file was opened. One of the cache is compared with its checksum when it
    # is downloaded; one in the folder only with `--verify`.
    for path, found in (
        zip(info.files(folder, split), encoded.origins, strict=True) if encoded.origins else ()
    ):
        wrong = [
            f"{key} ({found.get(key)} and {expected})"
            for key, expected in file_origin(info).items()
            if found.get(key) != expected
        ]
        if wrong:
            raise UserError(
                f"{path}: does not belong to {INFO_FILE} beside it; they differ in "
                f"{', '.join(wrong)}; delete {folder}, run `moma prepare`"
            )
    counts = info.counts[split]
    tokens, images = (int(each.sum(dtype=np.int64)) for each in (encoded.lengths, encoded.images))
    if Counts(documents=len(encoded), tokens=tokens, images=images) != counts:
        raise UserError(
            f"{folder}: damaged ({split} has {len(encoded)} documents and {tokens} tokens of "
            f"{counts.documents} and {counts.tokens}); delete it, run `moma prepare`"
        )
