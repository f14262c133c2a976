"""What is held out."""

from pathlib import Path

import pytest

from moma.data.documents import (
    Document,
    ImageRef,
    SourceConfig,
    held_out_share,
    is_held_out,
    which_held_out,
)
from moma.errors import StorageError


def test_the_share_of_a_source_overrides_that_of_the_recipe():
    assert held_out_share(SourceConfig(held_out=0.3), 0.1) == 0.3
    assert held_out_share(SourceConfig(held_out=0), 0.1) == 0
    assert held_out_share(SourceConfig(), 0.1) == 0.1


def test_the_decision_of_the_source_overrides_any_share():
    assert is_held_out(Document("a", (), held_out=True), 0)
    assert not is_held_out(Document("a", (), held_out=False), 1)


def test_a_larger_share_holds_out_the_same_documents_and_more():
    documents = [Document(f"d{number}", ()) for number in range(4000)]
    small, large = ({d.name for d in documents if is_held_out(d, share)} for share in (0.1, 0.3))
    assert 0.08 < len(small) / 4000 < 0.12 and 0.27 < len(large) / 4000 < 0.33
    assert small < large


def test_documents_of_one_origin_are_held_out_together():
    for origin in map(str, range(100)):
        whole = is_held_out(Document(origin, ()), 0.5)
        pieces = [Document(f"{origin}#{n}", (), held_out_with=origin) for n in range(5)]
        assert {is_held_out(piece, 0.5) for piece in pieces} == {whole}


def test_is_held_out_of_many_documents_equals_that_of_each():
    decisions = [None, True, False]
    documents = [
        Document(f"dö{n}", (), held_out=decisions[n % 3], held_out_with="x" * (n % 5))
        for n in range(300)
    ]
    for share in (0.0, 0.3, 1.0):
        expected = [is_held_out(document, share) for document in documents]
        assert which_held_out(documents, share).tolist() == expected
    assert which_held_out([], 0.5).tolist() == []


def test_a_failing_disk_is_not_a_missing_image():
    def fail():
        raise StorageError("the disk fails")

    with pytest.raises(StorageError):
        ImageRef("", fail, Path("nowhere")).missing()
