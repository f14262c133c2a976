"""Fetch what a data folder needs of its address: tokenizers, and what is known of the shards.

Arrow files are fetched when they are read (`reading.py`).
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from moma.data.config import DataConfig
from moma.data.outputs import DATA_MANIFEST, TOKENIZER_ENTRIES
from moma.data.provenance import Encoders, read_provenance
from moma.data.remote.manifest import (
    TOKENIZERS_MANIFEST,
    Manifest,
    source_manifest,
)
from moma.data.remote.reading import LINK_FILE, Link, read_link
from moma.data.remote.storage import Storage, open_storage
from moma.data.shards import INFO_FILE, ShardInfo, read_info, require_own
from moma.errors import UserError, list_names
from moma.files import atomic_open, atomic_write, checksum, lock_folder
from moma.runs import Tokenizers

# Seconds to wait for another process that fetches the same: fewer than ranks wait for each other.
LOCK_TIMEOUT = 500.0
# Made with the tokenizers, but no part of them.
BESIDE_TOKENIZERS = (DATA_MANIFEST, "codec/metrics.json")
logger = logging.getLogger(__name__)


def provide_data(
    config: DataConfig, refresh: bool = False, manifests: Mapping[str, Manifest] | None = None
) -> None:
    """Fetch what is needed to open the shards of a recipe; nothing without `data.remote`.

    Args:
        refresh: whether to require the newest shards at the address, where `manifests` names none.
        manifests: the shards that are needed, by source, in place of the newest; as
            `published_manifests` returns them.

    Raises:
        UserError: they are not complete at the address, or the data folder has others: it keeps its
            shards, which other jobs may read.
    """
    manifests = manifests or {}
    if config.remote is None or (not refresh and _is_provided(config, manifests)):
        return
    storage = open_storage(config.remote)
    config.path.mkdir(parents=True, exist_ok=True)
    with lock_folder(config.path, LOCK_TIMEOUT):
        if not fetch_tokenizers(storage, config.path):
            raise UserError(
                f"{config.remote}: has no tokenizers yet; run `moma prepare` with this data.remote"
            )
        for source in config.sources:
            folder, manifest = config.folder(source.name), manifests.get(source.name)
            if not fetch_shards(storage, folder, config.cache_bytes, manifest):
                raise UserError(
                    f"{config.remote}: has no complete shards of the source '{source.name}' yet; "
                    "run `moma prepare` with this data.remote to its end"
                )
    _warn_small_cache(config)


def published_manifests(config: DataConfig) -> dict[str, Manifest]:
    """Return of which shards at the address a data folder is, by source."""
    links = {source.name: read_link(config.folder(source.name)) for source in config.sources}
    return {name: link.manifest for name, link in links.items() if link and link.manifest}


def fetch_prepared(config: DataConfig) -> None:
    """Fetch, before data is prepared here, what is complete at the address and not here."""
    if config.remote is None:
        return
    storage = open_storage(config.remote)
    fetch_tokenizers(storage, config.path)
    for source in config.sources:
        folder = config.folder(source.name)
        if not folder.exists() and not folder.with_name(folder.name + ".partial").exists():
            fetch_shards(storage, folder, config.cache_bytes)


def fetch_tokenizers(storage: Storage, path: Path, only: str = "") -> bool:
    """Fetch the tokenizers and the manifest of a data folder; False if there are none.

    Args:
        only: name of the only file to fetch; empty for all.

    Raises:
        UserError: the folder has others.
    """
    manifest = storage.read_config(Manifest, TOKENIZERS_MANIFEST)
    if manifest is None:
        return False
    needed = {DATA_MANIFEST, Tokenizers(path).vocabulary.name}
    foreign = [
        name
        for name in manifest.files
        if name != DATA_MANIFEST and name.split("/")[0] not in TOKENIZER_ENTRIES
    ]
    if foreign or not needed <= manifest.files.keys():
        raise UserError(
            f"{storage.address}/{TOKENIZERS_MANIFEST}: 'files': names {list_names(foreign)} that "
            f"are no tokenizers, or not {list_names(sorted(needed))}; remove it, and run `moma "
            "prepare` again"
        )
    require_same_tokenizers(storage, manifest, path)
    wanted = [only] if only else manifest.files
    missing = [name for name in wanted if not (path / name).exists()]
    # Left by an interrupted job that had made no tokenizers yet, perhaps with other keys.
    if DATA_MANIFEST in wanted and DATA_MANIFEST not in missing and not has_tokenizers(path):
        missing.append(DATA_MANIFEST)
    # The manifest of the folder is last: a folder that has it is complete.
    for name in sorted(missing, key=lambda name: name == DATA_MANIFEST):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(path / name) as file:
            storage.download(manifest.object_of(name), manifest.files[name], file)
    return True


def has_tokenizers(path: Path) -> bool:
    """Return whether the manifest of a data folder records tokenizers that were made."""
    found = read_provenance(path)
    return found is not None and found.encoders != Encoders()


def require_same_tokenizers(storage: Storage, manifest: Manifest, path: Path) -> None:
    """Raise `UserError` if a data folder has other tokenizers than an address."""
    other = [
        name
        for name, expected in manifest.files.items()
        if name not in BESIDE_TOKENIZERS
        and (path / name).exists()
        and checksum(path / name) != tuple(expected)
    ]
    if other:
        raise UserError(
            f"{path}: has other tokenizers than {storage.address} ({list_names(other)} differ); "
            "choose another data.path, which gets those, or another data.remote"
        )


def fetch_shards(
    storage: Storage, folder: Path, cache_bytes: int, manifest: Manifest | None = None
) -> bool:
    """Fetch what is known of the shards of a source; False if they are not complete there.

    Args:
        folder: folder of the shards in a data folder; its name is that of the source.
        cache_bytes: as `data.cache_bytes`.
        manifest: of the shards; by default the one at the address.

    Raises:
        UserError: the shards in the folder are others, or were not made for this address; or
            incomplete ones have to be replaced, but have files that moma did not write.
    """
    name = source_manifest(folder.name)
    if manifest is None:
        manifest = storage.read_config(Manifest, name)
    if manifest is None:
        return False
    link = Link(
        address=storage.address,
        folder=manifest.folder,
        cache_bytes=cache_bytes,
        manifest=manifest,
    )
    old = read_link(folder)
    if folder.exists() and (old is None or old.address != storage.address):
        raise UserError(
            f"{folder}: was not prepared for data.remote = {storage.address}; run `moma prepare` "
            "with it, which uploads the shards, or choose another data.path"
        )
    if old is not None and old.manifest == manifest:
        if old != link:
            atomic_write(folder / LINK_FILE, link.model_dump_json() + "\n")
        return True
    if old is not None and old.manifest is not None:
        raise UserError(
            f"{folder}: has other shards of {storage.address} than are needed here, as a source "
            "was prepared anew; choose another data.path, which gets those that are needed, or "
            "delete the folder if no job reads it"
        )
    require_own(folder)
    unfinished = folder.parent / ".fetching"
    shutil.rmtree(unfinished, ignore_errors=True)
    fetched, replaced = unfinished / "new", unfinished / "old"
    _fetch_files(storage, name, manifest, fetched)
    atomic_write(fetched / LINK_FILE, link.model_dump_json() + "\n")
    if folder.exists():
        folder.rename(replaced)
    fetched.rename(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    return True


def _fetch_files(storage: Storage, name: str, manifest: Manifest, folder: Path) -> None:
    folder.mkdir(parents=True)
    for file, expected in manifest.files.items():
        if "/" in file or file == LINK_FILE:
            raise UserError(
                f"{storage.address}/{name}: 'files': {file!r} is no file of shards; remove it, and "
                "run `moma prepare` again"
            )
        with atomic_open(folder / file) as out:
            storage.download(manifest.object_of(file), expected, out)
    if INFO_FILE not in manifest.files:
        raise UserError(
            f"{storage.address}/{name}: 'files': names no {INFO_FILE}; remove it, and run `moma "
            "prepare` again"
        )
    storage.parse(ShardInfo, manifest.object_of(INFO_FILE), (folder / INFO_FILE).read_bytes())


def _is_provided(config: DataConfig, manifests: Mapping[str, Manifest]) -> bool:
    if not (config.path / DATA_MANIFEST).exists():
        return False
    for source in config.sources:
        folder = config.folder(source.name)
        link = read_link(folder)
        if link is None or (link.address, link.cache_bytes) != (config.remote, config.cache_bytes):
            return False
        if link.manifest is None:  # prepared here, but not complete at the address
            return False
        if link.manifest != manifests.get(source.name, link.manifest):
            return False
    return True


def _warn_small_cache(config: DataConfig) -> None:
    infos = [read_info(config.folder(source.name)) for source in config.sources]
    total = sum(
        size
        for info in infos
        for part in (info.parts if info else ())
        for size, _ in part.checksums.values()
    )
    if total > config.cache_bytes:
        logger.warning(
            "%s: the shards have %s bytes, data.cache_bytes is %s; documents are read in random "
            "order, so that many of them fetch a file again: increase it if the disk has space",
            config.remote,
            f"{total:,}",
            f"{config.cache_bytes:,}",
        )
