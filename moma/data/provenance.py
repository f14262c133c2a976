"""The manifest of a data folder: what its tokenizers and shards were made from.

    provenance.json   tokenizers: the configuration that made them
                      encoders:   fingerprints of tokenizer and codec, weights included
                      sources:    fingerprints of the sources they were trained on

A folder is a data folder if it has this manifest, whatever other files are in it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moma.data.cleaning.filters import filters_fingerprint
from moma.data.config import DataConfig
from moma.data.documents import SourceConfig, held_out_share, source_fingerprint
from moma.data.outputs import (
    DATA_ENTRIES,
    DATA_KIND,
    DATA_MANIFEST,
    TOKENIZER_ENTRIES,
    has_manifest,
)
from moma.errors import UserError, list_names
from moma.files import atomic_write, checksum, read_bounded
from moma.recipe import Config
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import CODEC_FILES

_MAX_KEYS_LISTED = 5


class Encoders(Config):
    """Fingerprints of the tokenizer and the codec, weights included; empty if there is none.

    The vocabulary is not enough: two codecs may share every id and encode images differently.
    """

    tokenizer: str = ""
    codec: str = ""

    @classmethod
    def from_folder(cls, folder: Tokenizers) -> "Encoders":
        """Return the fingerprints of the tokenizer and the codec in a folder."""
        codec = [folder.codec / name for name in CODEC_FILES]
        return cls(
            tokenizer=_fingerprint([folder.text]) if folder.text.exists() else "",
            codec=_fingerprint(codec) if folder.codec.exists() else "",
        )

    def differences(self, other: "Encoders") -> str:
        """Describe what differs, for a message; empty if nothing does."""
        pairs = zip(self, other.model_dump().values(), strict=True)
        return ", ".join(
            f"{key} ({ours or 'none'} and {theirs or 'none'})"
            for (key, ours), theirs in pairs
            if ours != theirs
        )


class SourceRecord(Config):
    """A source as it was when the tokenizers were trained on it.

    Attributes:
        fingerprint: `source_fingerprint`.
        documents: number of its documents, rejected ones included, if it was read to its end.
    """

    fingerprint: str
    documents: int | None = None


class Provenance(Config):
    """The manifest.

    Attributes:
        kind, format: identify the file.
        tokenizers: recipe keys and values that the tokenizers were made with, or the fingerprints
            of `data.tokenizers` if they were copied.
        encoders: fingerprints of the tokenizers in the folder.
        sources: each source that the tokenizers were trained on, by name.
    """

    kind: Literal["moma data"] = DATA_KIND
    format: Literal[1] = 1
    tokenizers: dict[str, Any] = Field(default={})
    encoders: Encoders = Encoders()
    sources: dict[str, SourceRecord] = Field(default={})


def read_provenance(folder: Path) -> Provenance | None:
    """Read the manifest of a data folder; None if it has none.

    Raises:
        UserError: the file is damaged, of another version, or not moma's.
    """
    file = folder / DATA_MANIFEST
    if not file.exists():
        return None
    if not has_manifest(folder, DATA_MANIFEST, DATA_KIND):
        raise UserError(
            f"{file}: damaged, or not written by `moma prepare`; restore it from a copy, or choose "
            "another folder with data.path=…"
        )
    try:
        return Provenance.model_validate_json(read_bounded(file))
    except ValueError as error:
        raise UserError(
            f"{file}: damaged or of another version; restore it from a copy, or delete {folder} "
            "and run `moma prepare` again"
        ) from error


class DataFolder:
    """A data folder while it is prepared; every change of its manifest is written at once."""

    def __init__(self, data: DataConfig) -> None:
        """Read the manifest, or write an empty one into a folder without files of its names.

        Raises:
            UserError: the manifest cannot be used, a file of the user's is in the way, or the
                tokenizers were changed after they were made.
        """
        self.data, self.tokenizers = data, Tokenizers(data.path)
        self._fingerprints: dict[str, str] = {}
        found = read_provenance(data.path)
        if found is None:
            self._require_unused()
        self._provenance = found or Provenance()
        if found is None:
            self._update()
        self._check_encoders()

    def bind(self, config: Mapping[str, Any]) -> None:
        """Record what the tokenizers are made with, or refuse another configuration.

        Without a text tokenizer nothing is bound yet: a configuration may prove impossible.

        Raises:
            UserError: the tokenizers were made with another configuration.
        """
        before = self._provenance.tokenizers if self.tokenizers.text.exists() else {}
        changed = [key for key in {**before, **config} if before.get(key) != config.get(key)]
        if before and changed:
            raise UserError(
                f"{self.data.path}: its tokenizers were made with another configuration "
                f"({list_names(changed, _MAX_KEYS_LISTED)}); choose another folder with "
                "data.path=…, or delete this one"
            )
        if changed:
            self._update(tokenizers=dict(config))

    @property
    def has_copied_tokenizers(self) -> bool:
        """Whether complete copies of `data.tokenizers` are here."""
        keys = self._provenance.tokenizers
        copied = any(key.startswith("data.tokenizers") for key in keys)
        return copied and self.tokenizers.vocabulary.exists()

    def record_encoders(self) -> Encoders:
        """Record and return the fingerprints of the tokenizers."""
        encoders = Encoders.from_folder(self.tokenizers)
        if encoders != self._provenance.encoders:
            self._update(encoders=encoders)
        return encoders

    def record_sources(self, totals: Mapping[str, int]) -> None:
        """Record the sources that the tokenizers are trained on: those of the first call stay.

        Args:
            totals: number of documents of each source that was read to its end.
        """
        before = self._provenance.sources
        now = {source.name: self._fingerprint(source) for source in self.data.sources}
        records = before or {name: SourceRecord(fingerprint=now[name]) for name in now}
        records = {
            name: record.model_copy(update={"documents": totals[name]})
            if name in totals and now.get(name) == record.fingerprint
            else record
            for name, record in records.items()
        }
        if records != before:
            self._update(sources=records)

    def changed_sources(self) -> list[str]:
        """Return the names of sources that were added or changed since `record_sources`."""
        if not self._provenance.sources:
            return []
        return [source.name for source in self.data.sources if self._record(source) is None]

    def known_documents(self, source: SourceConfig) -> int | None:
        """Return how many documents a source has, rejected ones included, if that is known."""
        record = self._record(source)
        return None if record is None else record.documents

    def _record(self, source: SourceConfig) -> SourceRecord | None:
        record = self._provenance.sources.get(source.name)
        same = record is not None and record.fingerprint == self._fingerprint(source)
        return record if same else None

    def _require_unused(self) -> None:
        path, tokenizers = self.data.path, self.data.tokenizers
        shared = tokenizers is not None and tokenizers.resolve() == path.resolve()
        allowed = TOKENIZER_ENTRIES if shared else ()
        found = [name for name in DATA_ENTRIES if (path / name).exists() and name not in allowed]
        if found:
            raise UserError(
                f"{path}: has {list_names(found)}, but no {DATA_MANIFEST}, so `moma "
                "prepare` did not write it and will not overwrite it; move it away, or choose "
                "another folder with data.path=… (data.tokenizers=… uses existing tokenizers)"
            )

    def _check_encoders(self) -> None:
        """Refuse a tokenizer or codec that was replaced; one that was deleted is made again."""
        found = Encoders.from_folder(self.tokenizers).model_dump()
        paths = {"tokenizer": self.tokenizers.text, "codec": self.tokenizers.codec}
        kept = {key: known if found[key] else "" for key, known in self._provenance.encoders}
        for key, known in kept.items():
            if known and found[key] != known:
                raise UserError(
                    f"{paths[key]}: changed after `moma prepare` made it; restore it, or choose "
                    "another folder with data.path=… and name these tokenizers with "
                    "data.tokenizers=…"
                )
        if Encoders(**kept) != self._provenance.encoders:
            self._update(encoders=Encoders(**kept))

    def _fingerprint(self, source: SourceConfig) -> str:
        # Computed once: it may look at every file of the source.
        if source.name not in self._fingerprints:
            held_out = held_out_share(source, self.data.held_out)
            filters = filters_fingerprint(source.clean)
            self._fingerprints[source.name] = source_fingerprint(source, held_out, filters)
        return self._fingerprints[source.name]

    def _update(self, **changes: Any) -> None:
        self._provenance = self._provenance.model_copy(update=changes)
        text = self._provenance.model_dump_json(indent=2) + "\n"
        atomic_write(self.data.path / DATA_MANIFEST, text)


def _fingerprint(files: Sequence[Path]) -> str:
    hashes = [bytes.fromhex(checksum(path)[1]) for path in files]
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]
