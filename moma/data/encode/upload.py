"""Files of shards that are uploaded to an address while they are made.

    shards/SOURCE/FINGERPRINT/  train-00012-00003-DIGITS.arrow, …-DIGITS.npy, …, and then their
                                record part-00012-00003.json
                                → manifest sources/SOURCE.json

The fingerprint is that of everything that the files depend on, and the digits those of their
content: machines that make the same part write the same objects if their codecs give the same
codes, and in any case none replaces another's.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from moma.data.encode.part_writer import record_name, rejected_name
from moma.data.mapped_files import MappedFile
from moma.data.remote.cache import Cache
from moma.data.remote.manifest import (
    Manifest,
    index_name,
    object_name,
    source_manifest,
)
from moma.data.remote.reading import (
    LINK_FILE,
    Link,
    cache_of,
    index_bytes,
    read_indices,
    read_link,
)
from moma.data.remote.storage import Storage, open_storage
from moma.data.shards import (
    INFO_FILE,
    ORIGIN_FILE,
    PLAN_FILE,
    REJECTED_FILE,
    SPLITS,
    VOCABULARY_FILE,
    PartRecord,
    ShardInfo,
    file_name,
    index_file,
)
from moma.errors import UserError
from moma.files import atomic_open, atomic_write, checksum


@dataclass(frozen=True)
class Remote:
    """Where the files of all sources are kept; can be sent to another process.

    Attributes:
        address, cache_bytes: `data.remote` and `data.cache_bytes`.
        path: the data folder.
    """

    address: str
    cache_bytes: int
    path: Path

    @property
    def cache(self) -> Cache:
        """Where uploaded files are moved."""
        return cache_of(self.path, self.cache_bytes)

    def connect(self, folder: Path, source: str, shard_tokens: int) -> "SourceUpload":
        """Return where the partial files in a folder are uploaded."""
        made_from = [(folder / name).read_text() for name in (ORIGIN_FILE, PLAN_FILE)]
        return self._upload(source, json.dumps([*made_from, shard_tokens]))

    def connect_complete(self, folder: Path, source: str) -> "SourceUpload":
        """Return where the finished shards in a folder are uploaded, or were.

        Raises:
            UserError: they were prepared for another address.
        """
        link = read_link(folder)
        if link is not None and link.address == self.address:
            update = {"cache_bytes": self.cache_bytes}
            return SourceUpload(link.model_copy(update=update), self.cache)
        if link is not None:
            raise UserError(
                f"{folder}: was prepared for {link.address}, not for data.remote = "
                f"{self.address}; choose another data.path, whose shards are made anew"
            )
        return self._upload(source, (folder / INFO_FILE).read_text())

    def _upload(self, source: str, made_from: str) -> "SourceUpload":
        folder = f"shards/{source}/{sha256(made_from.encode()).hexdigest()[:16]}"
        link = Link(address=self.address, folder=folder, cache_bytes=self.cache_bytes)
        return SourceUpload(link, self.cache)


class SourceUpload:
    """The files of one source at an address."""

    def __init__(self, link: Link, cache: Cache) -> None:
        self._link, self._cache, self._folder = link, cache, link.folder
        self._found: dict[str, int] = {}

    @cached_property
    def _storage(self) -> Storage:
        return open_storage(self._link.address)

    def link(self, folder: Path) -> None:
        """Record in a folder of shards where its Arrow files are."""
        atomic_write(folder / LINK_FILE, self._link.model_dump_json() + "\n")

    def upload(self, folder: Path, record: PartRecord) -> None:
        """Upload the files of a record and move them to the cache; then upload the record."""
        self._upload_files(folder, record, moves=True)
        self._storage.write(self._record(record), (record.model_dump_json() + "\n").encode())

    def _upload_files(self, folder: Path, record: PartRecord, moves: bool) -> None:
        for name, expected in record.checksums.items():
            path = folder / name
            if not path.exists():
                continue
            if path.suffix == ".arrow":
                documents = MappedFile(path)
                index = index_bytes(documents.lengths, documents.images)
                self._storage.write(self._object(index_name(name), expected), index)
            self._storage.upload(path, self._object(name, expected))
            if moves and path.suffix == ".arrow":
                self._cache.adopt(path, self._object(name, expected))

    def fetch_records(self, folder: Path, with_rejected: bool = True) -> None:
        """Fetch records that a folder lacks or that differ there.

        Another machine may have made a part again, with other documents rejected.

        Args:
            with_rejected: whether to fetch their rejected documents, too.
        """
        found = self._storage.sizes(self._folder)
        names = [name for name in found if name.startswith(f"{self._folder}/part-")]
        records = self._storage.read_all(names, missing_ok=True)
        # A record that another machine removed meanwhile is as if it had not been listed.
        removed = {*names} - {*records}
        self._found = {name: size for name, size in found.items() if name not in removed}
        for name, content in records.items():
            path = folder / Path(name).name
            if not path.exists() or path.read_bytes() != content:
                self._fetch_record(name, content, path, with_rejected)

    def _fetch_record(self, name: str, content: bytes, path: Path, with_rejected: bool) -> None:
        record = self._storage.parse(PartRecord, name, content)
        own = {*(file_name(split, record.name) for split in SPLITS), rejected_name(record)}
        if self._record(record) != name or not record.checksums.keys() <= own:
            raise UserError(
                f"{self._link.address}/{name}: is the record of {record.name}, or names files "
                "of others; remove it, and run the same command again"
            )
        # The record is last: if killed before, the older one still differs.
        for file in own:
            path.with_name(file).unlink(missing_ok=True)
        for file, expected in record.checksums.items():
            if with_rejected and not file.endswith(".arrow"):
                with atomic_open(path.with_name(file)) as out:
                    self._storage.download(self._object(file, expected), expected, out)
        # Not synced to disk: a damaged one is fetched again.
        path.write_bytes(content)

    def has_record(self, record: PartRecord) -> bool:
        """Return whether a record was at the address when records were fetched."""
        return self._record(record) in self._found

    def has(self, record: PartRecord, names: Iterable[str]) -> bool:
        """Return whether files of a record were at the address when records were fetched."""
        objects = {self._object(name, record.checksums[name]): name for name in names}
        return all(
            self._found.get(object_) == record.checksums[name][0]
            for object_, name in objects.items()
        )

    def unpublished_folders(self) -> list[str]:
        """Return other folders of the source, made from other keys or files, without a manifest."""
        source = Path(self._folder).parent
        published = self._storage.read_config(Manifest, source_manifest(source.name))
        known = {self._folder, published.folder if published else ""}
        folders = (f"{source}/{name}" for name in self._storage.folders(str(source)))
        return [folder for folder in folders if folder not in known]

    def upload_missing(self, folder: Path, records: Iterable[PartRecord]) -> None:
        """Upload the records, and their files, that are not at the address."""
        for record in records:
            if not self.has_record(record):
                self.upload(folder, record)

    def forget(self, records: Iterable[PartRecord]) -> None:
        """Remove records at the address; see `forget`."""
        forget(self._link, records)

    def publish(self, source: str, folder: Path, info: ShardInfo) -> None:
        """Write the manifest of a source, once all that it names is there.

        Args:
            folder: the finished shards.

        Raises:
            StorageError: something is missing, or has another size.
        """
        for record in info.parts:
            if record.total.documents and not record.checksums:
                raise UserError(
                    f"{folder}: was made by an older version, without checksums; choose another "
                    "data.path, whose shards are made anew"
                )
            self._upload_files(folder, record, moves=False)
        for split in SPLITS:
            with atomic_open(folder / index_file(split)) as file:
                file.write(self._index(info, split))
        names = [INFO_FILE, VOCABULARY_FILE, REJECTED_FILE, *map(index_file, SPLITS)]
        files = {name: checksum(folder / name) for name in names if (folder / name).exists()}
        listed = any(rejected_name(record) in record.checksums for record in info.parts)
        if listed and REJECTED_FILE not in files:
            raise UserError(
                f"{folder / REJECTED_FILE}: missing; run `moma prepare --verify` to list them again"
            )
        manifest = Manifest(folder=self._folder, files=files, documents=info.whole.total.documents)
        for name in files:
            self._storage.upload(folder / name, manifest.object_of(name))
        self._storage.require(self._expected(info, manifest), [self._folder])
        text = manifest.model_dump_json(indent=2) + "\n"
        self._storage.write(source_manifest(source), text.encode())
        SourceUpload(self._link.model_copy(update={"manifest": manifest}), self._cache).link(folder)

    def _index(self, info: ShardInfo, split: str) -> bytes:
        """Lengths and images of the documents of a split, from the objects of its files."""
        checksums = {
            name: record.checksums[name]
            for record in info.parts
            if (name := file_name(split, record.name)) in record.checksums
        }
        return index_bytes(*read_indices(self._link, checksums))

    def _expected(self, info: ShardInfo, manifest: Manifest) -> dict[str, int]:
        """Sizes of everything that a manifest names."""
        arrow = {
            self._object(name, expected): expected[0]
            for record in info.parts
            for name, expected in record.checksums.items()
            if name.endswith(".arrow")
        }
        small = {manifest.object_of(name): size for name, (size, _) in manifest.files.items()}
        return {**arrow, **small}

    def _object(self, file: str, expected: tuple[int, str]) -> str:
        return object_name(self._folder, file, expected)

    def _record(self, record: PartRecord) -> str:
        return f"{self._folder}/{record_name(record.part, record.file)}"


def forget(link: Link, records: Iterable[PartRecord]) -> None:
    """Remove records whose files are damaged at an address, and those files."""
    damaged = [*records]
    if not damaged:
        return
    storage = open_storage(link.address)
    found = storage.sizes(link.folder)
    # The last one of a part first: if killed in between, none is left without the ones before it.
    for record in reversed(damaged):
        objects = [
            object_name(link.folder, name, expected)
            for name, expected in record.checksums.items()
            if name.endswith(".arrow") and not link.is_intact(name, expected)
        ]
        names = [f"{link.folder}/{record_name(record.part, record.file)}", *objects]
        storage.remove([name for name in names if name in found])
