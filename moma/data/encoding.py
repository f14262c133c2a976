"""Documents → encoded shards: token ids on disk, ready to be mixed and packed.

    source.documents() → chunks → texts through the tokenizer, pictures through the codec
                       → beginning, segments in order, end → train.arrow, held_out.arrow

A source's folder holds one Arrow file for each split (a row is a document: `ids`, `pictures`,
`name`), the vocabulary, and `shard.json`, which says what was encoded with which settings. It
appears under its name only when it is whole.
"""

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from pydantic import ValidationError

from moma.data.documents import Document, Picture, Source, accepted, is_held_out
from moma.errors import UserError
from moma.recipe import Config
from moma.vocabulary import IMAGE, Vocabulary

SPLITS = ("train", "held_out")

CHUNK_DOCUMENTS = 256
BATCH_PICTURES = 16
# Pictures arrive at full size: a batch is also cut at 64 million pixels, about 200 MB.
BATCH_PIXELS = 64_000_000

EncodeText = Callable[[list[str]], list[list[int]]]
EncodePictures = Callable[[list[Image.Image]], np.ndarray]


@runtime_checkable
class Stamped(Protocol):
    """A source that can tell whether the files behind it have changed."""

    def stamp(self) -> str:
        """Changes when the files do."""
        ...


class Counts(Config):
    """How much a split holds: documents, and their tokens and pictures."""

    documents: int = 0
    tokens: int = 0
    pictures: int = 0

    def plus(self, table: pa.Table) -> "Counts":
        """These counts and those of a table of encoded documents."""
        return Counts(
            documents=self.documents + table.num_rows,
            tokens=self.tokens + len(table.column("ids").combine_chunks().flatten()),
            pictures=self.pictures + int(np.sum(table.column("pictures").to_numpy())),
        )


class ShardInfo(Config):
    """What a folder of shards holds, and what it was made from; stored as `shard.json`.

    Attributes:
        source: name of the source.
        settings: digest of the source's settings and files, the held-out share and the encoders.
        fingerprint: the vocabulary's.
        counts: what each split holds.
    """

    source: str
    settings: str
    fingerprint: str
    counts: dict[str, Counts]


class Shard:
    """The encoded documents of one split, memory-mapped.

    Attributes:
        dataset: the rows as a Hugging Face dataset: `ids`, `pictures`, `name`.
        pictures: number of pictures of each document, int32 of shape [documents].
    """

    def __init__(self, path: Path) -> None:
        self.dataset = datasets.Dataset.from_file(str(path))
        columns = self.dataset.data.table
        self.pictures: np.ndarray = columns.column("pictures").to_numpy()
        # Views of the mapped file: a document is a slice, without going through Python lists.
        chunks = columns.column("ids").chunks
        self._flat = [chunk.values.to_numpy(zero_copy_only=False) for chunk in chunks]
        self._bounds = [chunk.offsets.to_numpy() for chunk in chunks]
        self._first_row = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def ids(self, row: int) -> np.ndarray:
        """Token ids of a document, unsigned integers of shape [tokens]; a read-only view."""
        chunk = int(np.searchsorted(self._first_row, row, side="right")) - 1
        at = row - self._first_row[chunk]
        return self._flat[chunk][self._bounds[chunk][at] : self._bounds[chunk][at + 1]]


@dataclass(frozen=True)
class Shards:
    """The shards of one source.

    Attributes:
        info: what they hold.
        splits: a shard for each name in `SPLITS`.
    """

    info: ShardInfo
    splits: dict[str, Shard]


def encode_source(
    source: Source,
    encode_text: EncodeText,
    encode_pictures: EncodePictures,
    vocabulary: Vocabulary,
    held_out_share: float,
    folder: Path,
    *,
    encoders: str = "",
    progress: Callable[[int], None] = lambda documents: None,
) -> ShardInfo:
    """Encode every document of a source into `folder`, unless that has been done already.

    Args:
        source: where the documents come from.
        encode_text: texts → their token ids, none of which is a special id or an image code.
        encode_pictures: pictures → codes, integers of shape [pictures, codes_per_image].
        vocabulary: the ids.
        held_out_share: share of the documents kept from training, where the source itself does
            not decide it.
        folder: the source's own folder; replaced if it was made with other settings.
        encoders: digest of the tokenizer and the codec. The vocabulary does not know their
            weights: without it, shards of an older codec would be taken for complete.
        progress: told how many documents have been written since the last call.

    Raises:
        UserError: the source has no documents, or one of them cannot be read.
    """
    settings = _settings_digest(source, held_out_share, encoders)
    done = _complete_info(folder)
    if done is not None and (done.settings, done.fingerprint) == (settings, vocabulary.fingerprint):
        return done
    with _whole_or_nothing(folder) as partial:
        encode = _Encoder(encode_text, encode_pictures, vocabulary)
        info = ShardInfo(
            source=source.name,
            settings=settings,
            fingerprint=vocabulary.fingerprint,
            counts=_write(source, encode, vocabulary, held_out_share, partial, progress),
        )
        vocabulary.save(partial / "vocabulary.json")
        (partial / "shard.json").write_text(info.model_dump_json(indent=2) + "\n")
    return info


def open_shards(folder: Path, vocabulary: Vocabulary) -> Shards:
    """Open the shards of one source.

    Raises:
        UserError: they are missing or incomplete, or were encoded with another vocabulary.
    """
    info = _complete_info(folder)
    if info is None:
        raise UserError(f"{folder}: no complete shards here; run `moma prepare`")
    if info.fingerprint != vocabulary.fingerprint:
        theirs = Vocabulary.load(folder / "vocabulary.json")
        raise UserError(
            f"{folder}: encoded with vocabulary {info.fingerprint}, but {vocabulary.fingerprint} "
            f"is asked for; they differ in {theirs.differences(vocabulary)}; run `moma prepare` "
            "again or use the tokenizer and codec that it was encoded with"
        )
    try:
        splits = {split: Shard(folder / f"{split}.arrow") for split in SPLITS}
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{folder}: damaged ({error}); delete it, run `moma prepare`") from error
    return Shards(info, splits)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A folder to write to; it takes the place of `folder` if nothing goes wrong."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Encoder:
    """A chunk of documents → the token ids of each."""

    def __init__(
        self, encode_text: EncodeText, encode_pictures: EncodePictures, vocabulary: Vocabulary
    ) -> None:
        self._encode_text = encode_text
        self._encode_pictures = encode_pictures
        self._vocabulary = vocabulary
        self._reserved = vocabulary.modality_of_id == IMAGE
        self._reserved[
            [
                vocabulary.beginning,
                vocabulary.end,
                vocabulary.padding,
                vocabulary.begin_image,
                vocabulary.end_image,
            ]
        ] = True

    def __call__(self, documents: Sequence[Document]) -> list[np.ndarray]:
        segments = [segment for document in documents for segment in document.segments]
        texts = self._texts([segment for segment in segments if isinstance(segment, str)])
        pictures = self._pictures([part for part in segments if isinstance(part, Picture)])
        return [self._join(document, texts, pictures) for document in documents]

    def _join(
        self, document: Document, texts: Iterator[list[int]], pictures: Iterator[list[int]]
    ) -> np.ndarray:
        ids = [self._vocabulary.beginning]
        for segment in document.segments:
            ids += next(texts if isinstance(segment, str) else pictures)
        return np.array([*ids, self._vocabulary.end])

    def _texts(self, texts: list[str]) -> Iterator[list[int]]:
        for text, ids in zip(texts, self._encode_text(texts) if texts else [], strict=True):
            if self._reserved[ids].any():
                raise ValueError(f"the tokenizer gave a special id or an image code for {text!r}")
            yield ids

    def _pictures(self, pictures: list[Picture]) -> Iterator[list[int]]:
        """Wrapped codes of every picture; equal pictures of the chunk are encoded once."""
        digests: list[bytes] = []
        known: dict[bytes, list[int]] = {}
        for batch in _batches(self._new_pictures(pictures, digests)):
            codes = self._encode_pictures([image for _, image in batch])
            expected = (len(batch), self._vocabulary.codes_per_image)
            if codes.shape != expected:
                raise ValueError(f"the codec gave codes of shape {codes.shape}, not {expected}")
            for (digest, _), codes_of_one in zip(batch, codes, strict=True):
                known[digest] = self._vocabulary.wrap_image(codes_of_one)
        return (known[digest] for digest in digests)

    def _new_pictures(
        self, pictures: list[Picture], digests: list[bytes]
    ) -> Iterator[tuple[bytes, Image.Image]]:
        """The pictures not seen before, with their digests; notes the digest of every picture."""
        seen: set[bytes] = set()
        for picture in pictures:
            image = picture.read()
            digests.append(_digest(image))
            if digests[-1] not in seen:
                seen.add(digests[-1])
                yield digests[-1], image


def _digest(image: Image.Image) -> bytes:
    # The palette and transparency belong to the picture, but not to `tobytes`.
    frame = f"{image.mode} {image.size} {image.getpalette()} {image.info.get('transparency')}"
    return hashlib.sha256(frame.encode() + image.tobytes()).digest()


def _batches(
    pictures: Iterable[tuple[bytes, Image.Image]],
) -> Iterator[list[tuple[bytes, Image.Image]]]:
    batch: list[tuple[bytes, Image.Image]] = []
    pixels = 0
    for digest, image in pictures:
        batch.append((digest, image))
        pixels += image.width * image.height
        if len(batch) == BATCH_PICTURES or pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def _write(
    source: Source,
    encode: _Encoder,
    vocabulary: Vocabulary,
    held_out_share: float,
    folder: Path,
    progress: Callable[[int], None],
) -> dict[str, Counts]:
    """Encode chunk after chunk into one file a split; returns what each split holds."""
    features = _features(vocabulary)
    writers = [
        ArrowWriter(path=str(folder / f"{split}.arrow"), features=features) for split in SPLITS
    ]
    counts = [Counts() for _ in SPLITS]
    documents = accepted(source.documents())
    try:
        while chunk := list(itertools.islice(documents, CHUNK_DOCUMENTS)):
            table = _table(chunk, encode(chunk), features)
            held_out = np.array([is_held_out(document, held_out_share) for document in chunk])
            for split, chosen in enumerate((~held_out, held_out)):
                part = table.filter(pa.array(chosen))
                writers[split].write_table(part, CHUNK_DOCUMENTS)
                counts[split] = counts[split].plus(part)
            progress(len(chunk))
        for writer in writers:
            writer.finalize()
    finally:
        for writer in writers:
            writer.close()
    if not any(count.documents for count in counts):
        raise UserError(f"source '{source.name}': it has no documents; check its settings")
    return dict(zip(SPLITS, counts, strict=True))


def _features(vocabulary: Vocabulary) -> datasets.Features:
    smallest = np.min_scalar_type(vocabulary.size - 1)
    return datasets.Features(
        {
            "ids": datasets.List(datasets.Value(smallest.name)),
            "pictures": datasets.Value("int32"),
            "name": datasets.Value("string"),
        }
    )


def _table(
    documents: Sequence[Document], ids: Sequence[np.ndarray], features: datasets.Features
) -> pa.Table:
    bounds = np.cumsum([0, *(len(of_one) for of_one in ids)], dtype=np.int32)
    flat = pa.array(np.concatenate(ids), type=features.arrow_schema.field("ids").type.value_type)
    pictures = [
        sum(isinstance(segment, Picture) for segment in document.segments) for document in documents
    ]
    columns = {
        "ids": pa.ListArray.from_arrays(pa.array(bounds), flat),
        "pictures": pa.array(pictures, type=pa.int32()),
        "name": pa.array([document.name for document in documents]),
    }
    return pa.table(columns, schema=features.arrow_schema)


def _settings_digest(source: Source, held_out_share: float, encoders: str) -> str:
    # How often a source is drawn does not change what its documents are.
    settings = source.model_dump_json(exclude={"weight"}) if isinstance(source, Config) else ""
    stamp = source.stamp() if isinstance(source, Stamped) else ""
    parts = (source.name, settings, stamp, str(held_out_share), encoders)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _complete_info(folder: Path) -> ShardInfo | None:
    try:
        return ShardInfo.model_validate_json((folder / "shard.json").read_text())
    except (OSError, ValidationError):
        return None
