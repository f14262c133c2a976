"""Fetch what is at an address so far, complete or not, for `moma data inspect`.

Arrow files are fetched when a document is read.
"""

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from moma.data.encode.upload import SourceUpload
from moma.data.remote.fetching import fetch_shards, fetch_tokenizers
from moma.data.remote.reading import Link, cache_of
from moma.data.remote.storage import Storage, open_storage
from moma.data.shards import ORIGIN_FILE, ShardInfo
from moma.errors import UserError, list_names
from moma.files import atomic_write
from moma.runs import Tokenizers
from moma.vocabulary import Vocabulary

# Nothing that is read once has to make room.
_CACHE_BYTES = 2**62


def fetch_existing(address: str, path: Path, source: str | None, decodes: bool) -> None:
    """Fetch what `moma.data.inspect` needs of an address.

    Of a source that is not complete there, it is what was uploaded so far. If that was made from
    several versions of its keys or files, it is the version with most files of shards.

    Args:
        path: an empty folder, which becomes a data folder.
        source: only this source; None for all.
        decodes: whether documents are decoded, which needs all of the tokenizers.

    Raises:
        UserError: nothing is there, or no such source.
    """
    storage, vocabulary = open_storage(address), Tokenizers(path).vocabulary
    if not fetch_tokenizers(storage, path, only="" if decodes else vocabulary.name):
        raise UserError(
            f"{address}: has no tokenizers yet; run `moma prepare` with this data.remote, or check "
            "the address"
        )
    manifests = (
        re.fullmatch(r"sources/(\w[^/]*)\.json", name) for name in storage.sizes("sources")
    )
    complete = [found[1] for found in manifests if found]
    others = [name for name in storage.folders("shards") if name not in complete]
    begun = {name: made for name in others if (made := _begun(storage, name))}
    names = sorted({*complete, *begun})
    if not names:
        raise UserError(f"{address}: nothing is complete yet; inspect it later")
    if source is not None and source not in names:
        raise UserError(f"--source {source}: {address} has {list_names(names)}; name one of them")
    for name in names if source is None else [source]:
        folder = path / "shards" / name
        if not fetch_shards(storage, folder, _CACHE_BYTES):
            if name not in begun:
                raise UserError(f"{address}: source '{name}' was removed meanwhile; inspect again")
            link = Link(address=address, folder=begun[name], cache_bytes=_CACHE_BYTES)
            fetch_begun(link, path, name, Vocabulary.load(vocabulary))


def _begun(storage: Storage, source: str) -> str:
    """Return the folder of a source with most records; empty if there are none."""
    if not re.match(r"\w", source):  # of someone else, such as `..`
        return ""
    paths = map(PurePosixPath, storage.sizes(f"shards/{source}"))
    records = Counter(str(path.parent) for path in paths if path.name.startswith("part-"))
    return max(records, key=records.__getitem__, default="")


def fetch_begun(link: Link, path: Path, source: str, vocabulary: Vocabulary) -> None:
    """Fetch the records of a source that is not complete; not the rejected documents they list.

    Args:
        path: the data folder.

    Raises:
        UserError: a record cannot be used, or the address not be read.
    """
    folder = path / "shards" / f"{source}.partial"
    folder.mkdir(parents=True)
    upload = SourceUpload(link, cache_of(path, link.cache_bytes))
    upload.fetch_records(folder, with_rejected=False)
    upload.link(folder)
    # Of the origin, which only the machines that prepare have, no more is needed.
    origin = ShardInfo(
        source=source, source_fingerprint="", vocabulary_fingerprint=vocabulary.fingerprint
    )
    atomic_write(folder / ORIGIN_FILE, origin.model_dump_json() + "\n")
