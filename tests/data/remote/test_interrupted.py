"""Preparing is interrupted, and continued with another address or none."""

import pytest

from moma.data.encode.prepare import prepare
from moma.data.encode.upload import SourceUpload
from moma.data.shards import PartRecord
from tests.data.encode.preparing import contents
from tests.data.remote.test_training import ADDRESS, CPU, at, batches_of, memory, with_data


@pytest.mark.parametrize("address", [None, "ram://bucket/other"])
def test_what_is_not_at_the_new_address_is_made_again(tiny, tmp_path, monkeypatch, address):
    memory().clear()
    upload = SourceUpload.upload
    uploaded: list[PartRecord] = []

    def upload_some(self, folder, record):
        if len(uploaded) == 5:
            raise KeyboardInterrupt
        uploaded.append(record)
        upload(self, folder, record)

    recipe = at(tiny, tmp_path / "data", tokenizers=tiny.data.path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SourceUpload, "upload", upload_some)
        prepare(recipe, CPU, quiet=True, processes=1)
    assert len(uploaded) == 5
    before = {name: memory()[name].getvalue() for name in memory()}
    other, undisturbed = (
        with_data(recipe, remote=address, path=tmp_path / name) for name in ("data", "undisturbed")
    )
    prepare(other, CPU, quiet=True, processes=1)
    prepare(undisturbed, CPU, quiet=True, processes=1)
    assert batches_of(other) == batches_of(undisturbed)
    if address is None:
        assert contents(tmp_path / "data/shards") == contents(tmp_path / "undisturbed/shards")
    # Nothing was removed at the former address.
    assert before.items() <= {name: memory()[name].getvalue() for name in memory()}.items()
    assert all(ADDRESS.partition(":/")[2] in name for name in before)
