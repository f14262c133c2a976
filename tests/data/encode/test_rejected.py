"""Documents that cannot be encoded: what is rejected, when encoding stops, and how it goes on."""

from functools import partial

import pytest
from PIL import Image

from moma.data.documents import Document, ImageRef, Rejected
from moma.data.encode import chunks
from moma.data.shards import Counts, open_shards
from moma.errors import UserError
from tests.data.encode.encoding import (
    VOCABULARY,
    Numbers,
    encode_source,
    encode_text,
    rejected_in,
    run,
    unreadable,
)
from tests.factories import ListSource


def test_rows_that_cannot_be_documents_are_rejected_and_change_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHARACTERS", 5)
    monkeypatch.setattr(chunks, "MAX_IMAGES", 2)
    red = ImageRef("red", partial(Image.new, "RGB", (2, 2), (7, 0, 0)))
    source = ListSource(
        "a",
        Rejected("list, row 2", "no caption"),
        Document("doc 2", ("b", red, unreadable("cannot read 3.png"), "c"), row="list, row 3"),
        Document("doc 3", (red, "d"), row="list, row 4"),
        Document("doc 4", ()),
        Document("doc 5", ("", "")),
        "\ud800",
        "long text",
        Document("doc 8", (red, red, red)),
        "e",
        Document("bad \ud800", ("f",), row="list, row 11"),
        Document("x" * 20_000, ("f",)),
    )
    info = run(tmp_path / "shard", source, max_rejected=1)
    train = open_shards(tmp_path / "shard", VOCABULARY).splits["train"]
    assert [train.name(row) for row in range(len(train))] == ["doc 0", "doc 3", "doc 9"]
    assert train.ids(1).tolist() == [0, 3, 5 + 7, 6, 7, 8, 4, *encode_text(["d"])[0], 1]
    assert info.rejected == 9 and info.whole.documents_read == 12
    empty = "it is empty: neither text nor an image"
    assert [(line["row"], line["reason"]) for line in rejected_in(tmp_path / "shard")] == [
        ("list, row 2", "no caption"),
        ("list, row 3", "cannot read 3.png"),
        ("doc 4", empty),
        ("doc 5", empty),
        ("doc 6", "not Unicode (surrogates not allowed at character 0 of '\\ud800'); fix the text"),
        ("doc 7", "9 characters of text, at most 5; split the document"),
        ("doc 8", "3 images, at most 2; set the source's max_images"),
        (
            "list, row 11",
            "not Unicode (surrogates not allowed at character 4 of 'bad \\ud800'); fix the text",
        ),
        (
            f"{'x' * 197} … {'x' * 100}",
            "its name has 20000 characters, at most 10000; shorten it",
        ),
    ]
    assert {line["source"] for line in rejected_in(tmp_path / "shard")} == {"listed"}


def rows_with(bad, count):
    return [Rejected(f"row {n}", f"row {n} is bad") if n in bad else "good" for n in range(count)]


@pytest.mark.parametrize(
    ("bad", "count", "share", "stops_at"),
    [
        ({0}, 100, 0.01, None),
        ({0}, 99, 0.01, 99),  # few rows are checked at the end
        ({0, 1}, 200, 0.01, 100),
        ({0, 1}, 200, 0.02, None),
        (range(200, 240), 300, 0.02, 210),
        ({3}, 10, 0.0, 10),
    ],
)
def test_too_many_rejected_rows_stop_the_run(tmp_path, monkeypatch, bad, count, share, stops_at):
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 10)
    source = ListSource(*rows_with(bad, count))
    seen = []
    call = partial(
        run,
        tmp_path / "shard",
        source,
        shard_tokens=50,
        max_rejected=share,
        progress=lambda info: seen.append(info.documents_read),
    )
    if stops_at is None:
        assert call().rejected == len(bad)
        return
    first = min(bad)
    with pytest.raises(
        UserError, match=rf"'listed': \d+ of {stops_at} documents.*: row {first} is bad"
    ):
        call()
    assert seen[-1] == stops_at
    assert not (tmp_path / "shard").exists()


def test_a_higher_limit_resumes_and_fixed_rows_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 10)
    rows = rows_with(range(100, 110), 200)
    limits = {"shard_tokens": 50, "max_rejected": 0.01}
    for folder in ("allowed", "fixed"):
        with pytest.raises(UserError, match="10 of 110 documents"):
            run(tmp_path / folder, ListSource(*rows), **limits)
    seen = []
    info = run(
        tmp_path / "allowed",
        ListSource(*rows),
        shard_tokens=50,
        max_rejected=0.1,
        progress=lambda info: seen.append(info.documents_read),
    )
    assert seen[0] == 100 and info.rejected == 10 and info.whole.total.documents == 190
    with pytest.raises(UserError, match=r"10 of 200 documents.*row 100 is bad"):
        run(tmp_path / "allowed", ListSource(*rows), **limits)
    # All rows are documents now, although the configuration is the same.
    fixed = run(tmp_path / "fixed", ListSource(*["good"] * 200), **limits)
    assert fixed.rejected == 0 and fixed.whole.total.documents == 200
    assert rejected_in(tmp_path / "fixed") == []


def test_rejected_rows_on_disk_are_read_again_after_a_stop(tmp_path):
    rows = rows_with({3}, 10)  # checked at the end, when their part is on disk
    with pytest.raises(UserError, match="1 of 10 documents"):
        run(tmp_path / "shard", ListSource(*rows))
    assert run(tmp_path / "shard", ListSource(*["good"] * 10)).whole.total.documents == 10


def test_the_work_per_part_does_not_grow_with_earlier_parts(tmp_path, monkeypatch):
    """Counted by the sums of counts."""
    sums, add = [0], Counts.__add__

    def counted(one, other):
        sums[-1] += 1
        return add(one, other)

    monkeypatch.setattr(Counts, "__add__", counted)
    for count in (20, 40):
        run(tmp_path / str(count), Numbers(count=count), shard_tokens=1)
        sums.append(0)
    assert sums[1] < 2.2 * sums[0]


def test_rejected_documents_take_bounded_space_in_messages_and_lists(tmp_path):
    """However long their names and reasons are."""
    rows = [Rejected("row " + "r" * 10**6, "é" * 10**6) for _ in range(20)]
    with pytest.raises(UserError) as caught:
        run(tmp_path / "shard", ListSource(*rows))
    assert len(str(caught.value)) < 2000
    (written,) = (tmp_path / "shard.partial").glob("rejected-*.jsonl*")
    assert written.stat().st_size < 20 * 8000


def test_an_image_without_a_codec_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no codec.*codec_training\.max_documents"):
        encode_source(Numbers(), encode_text, None, VOCABULARY, 0, tmp_path / "shard")
