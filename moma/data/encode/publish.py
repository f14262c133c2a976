"""Publish prepared data at an address: tokenizers before anything is encoded, then each source."""

from moma.data.encode.upload import Remote
from moma.data.outputs import DATA_MANIFEST
from moma.data.provenance import DataFolder
from moma.data.remote.fetching import require_same_tokenizers
from moma.data.remote.manifest import TOKENIZERS_MANIFEST, Manifest
from moma.data.remote.storage import open_storage
from moma.data.shards import ShardInfo
from moma.files import checksum

_FOLDER = "tokenizers"


def publish_tokenizers(folder: DataFolder) -> None:
    """Upload the tokenizers of a data folder, unless they are there.

    Raises:
        UserError: there are others at the address.
    """
    data = folder.data
    assert data.remote is not None
    storage = open_storage(data.remote)
    folder.record_encoders()
    names = [*folder.tokenizers.file_names(), DATA_MANIFEST]
    files = {name: checksum(data.path / name) for name in names}
    manifest = Manifest(folder=_FOLDER, files=files)
    existing = storage.read_config(Manifest, TOKENIZERS_MANIFEST)
    if existing is None:
        for name in files:
            storage.upload(data.path / name, manifest.object_of(name))
        sizes = {manifest.object_of(name): size for name, (size, _) in files.items()}
        storage.require(sizes, [_FOLDER])
        content = (manifest.model_dump_json(indent=2) + "\n").encode()
        # Another machine may have been first.
        if not storage.create(TOKENIZERS_MANIFEST, content):
            existing = storage.read_config(Manifest, TOKENIZERS_MANIFEST)
    if existing is not None:
        require_same_tokenizers(storage, existing, data.path)


def publish_shards(remote: Remote, folder: DataFolder, infos: dict[str, ShardInfo]) -> None:
    """Upload what is missing of the shards of each source, and then its manifest."""
    for name, info in infos.items():
        shards = folder.data.folder(name)
        upload = remote.connect_complete(shards, name)
        upload.publish(name, shards, info)
