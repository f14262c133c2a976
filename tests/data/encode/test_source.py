"""Encoding a source: tokens of documents, rejected rows, and repeated calls."""

import json
import threading
from dataclasses import replace
from functools import partial
from typing import Literal

import datasets
import numpy as np
import pytest
from PIL import Image

from moma.data.documents import Document, ImageRef, Rejected
from moma.data.encode import chunks, tokens
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.source import Limits, encode_source
from moma.data.provenance import Encoders
from moma.data.shards import Counts, open_shards
from moma.demo.drawings import render
from moma.errors import UserError
from moma.images import square_pixels
from moma.recipe import Config
from tests.factories import make_vocabulary

VOCABULARY = make_vocabulary(300)


class Numbers(Config):
    """Documents `n0`, `n1`, …; every third has an image, one of two."""

    kind: Literal["numbers"] = "numbers"
    name: str = "numbers"
    weight: float = 1.0
    count: int = 20

    def documents(self):
        for number in range(self.count):
            image = ImageRef(f"p{number}", partial(Image.new, "L", (2, 2), number % 2 * 9))
            segments = (f"n{number}", image, "!") if number % 3 == 0 else (f"n{number}",)
            yield Document(f"doc {number}", segments, held_out=number % 5 == 4)


class Given:
    """A source of given rows; a string becomes a document of that text."""

    name = "given"

    def __init__(self, *rows):
        self.rows = rows

    def documents(self):
        for number, row in enumerate(self.rows):
            yield Document(f"doc {number}", (row,)) if isinstance(row, str) else row


def encode_text(texts):
    return [[30 + byte for byte in text.encode()] for text in texts]


class Codec:
    def __init__(self):
        self.calls, self.threads = [], set()

    def __call__(self, images):
        self.calls.append(len(images))
        self.threads.add(threading.get_ident())
        return np.array([[image[0, 0, 0], 1, 2, 3] for image in images])


def unreadable(reason):
    def read():
        raise UserError(reason)

    return ImageRef("broken", read)


def run(folder, source=None, codec=None, share=0.02, **options):
    return encode_source(
        source or Numbers(), encode_text, codec or Codec(), VOCABULARY, share, folder, **options
    )


def rejected_in(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_a_document_is_text_and_wrapped_images_between_beginning_and_end(tmp_path):
    info = run(tmp_path / "shard")
    train, held_out = open_shards(tmp_path / "shard", VOCABULARY).splits.values()
    assert (len(train), len(held_out)) == (16, 4)
    expected = [0, *encode_text(["n3"])[0], 3, 5 + 9, 6, 7, 8, 4, *encode_text(["!"])[0], 1]
    assert train.ids(3).tolist() == expected
    assert train.ids(1).tolist() == [0, *encode_text(["n1"])[0], 1]
    assert train.dataset[3] == {"ids": expected, "images": 1, "name": "doc 3"}
    assert train.dataset.features["ids"] == datasets.List(datasets.Value("uint16"))
    assert held_out.dataset["name"][:] == ["doc 4", "doc 9", "doc 14", "doc 19"]
    assert info.counts["train"].documents == 16
    assert info.counts["train"].tokens == sum(len(train.ids(row)) for row in range(16))
    assert info.counts["train"].images == train.images.sum()


def test_equal_images_of_a_chunk_are_encoded_once(tmp_path):
    codec = Codec()
    run(tmp_path / "shard", codec=codec)
    assert codec.calls == [2]


@pytest.mark.parametrize("shard_tokens", [20, 60, 10_000])
def test_chunks_and_files_do_not_change_the_rows(tmp_path, monkeypatch, shard_tokens):
    run(tmp_path / "whole")
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(tokens, "BATCH_IMAGES", 1)
    codec, seen = Codec(), []
    info = run(
        tmp_path / "shard",
        codec=codec,
        limits=Limits(shard_tokens=shard_tokens),
        progress=lambda info: seen.append(info.documents_read),
    )
    assert seen == [0, 3, 6, 9, 12, 15, 18, 20]
    assert codec.calls == [1] * 7
    # A part ends with the chunk that fills it, and they cover the rows without gap or overlap.
    assert [part.first for part in info.parts] == [0, *[part.stop for part in info.parts][:-1]]
    for part in info.parts[:-1]:
        assert sum(counts.tokens for counts in part.counts.values()) >= shard_tokens
    assert (len(info.parts) == 1) == (shard_tokens == 10_000)
    whole = open_shards(tmp_path / "whole", VOCABULARY)
    for split, shard in open_shards(tmp_path / "shard", VOCABULARY).splits.items():
        expected = whole.splits[split]
        assert len(shard) == len(expected)
        assert shard.dataset[:] == expected.dataset[:]
        assert shard.lengths.tolist() == [len(ids) for ids in expected.dataset["ids"]]
        for row in range(len(shard)):
            assert shard.ids(row).tolist() == expected.dataset[row]["ids"]
            assert not shard.ids(row).flags.owndata


def test_a_file_exceeds_its_size_by_at_most_one_document(tmp_path):
    info = run(tmp_path / "shard", limits=Limits(shard_tokens=1))
    assert [part.stop for part in info.parts] == list(range(1, 21))
    info = run(tmp_path / "larger", limits=Limits(shard_tokens=40))
    longest = 11
    for part in info.parts[:-1]:
        assert 40 <= sum(counts.tokens for counts in part.counts.values()) < 2 * 40 + longest


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65537, "uint32")])
def test_ids_take_the_smallest_type(tmp_path, size, dtype):
    vocabulary = replace(VOCABULARY, size=size)
    last = lambda texts: [[size - 1] for _ in texts]  # noqa: E731
    encode_source(Given("a"), last, None, vocabulary, 0, tmp_path / "shard")
    ids = open_shards(tmp_path / "shard", vocabulary).splits["train"].ids(0)
    assert ids.dtype == dtype and ids.tolist() == [0, size - 1, 1]


def test_an_empty_split_can_be_opened(tmp_path):
    run(tmp_path / "shard", source=Numbers(count=3))
    held_out = open_shards(tmp_path / "shard", VOCABULARY).splits["held_out"]
    assert len(held_out) == len(held_out.images) == len(held_out.dataset) == 0
    assert held_out.dataset.features["ids"] == datasets.List(datasets.Value("uint16"))


def test_complete_shards_are_not_encoded_again(tmp_path):
    info, codec = run(tmp_path / "shard"), Codec()
    assert run(tmp_path / "shard", Numbers(weight=3), codec) == info
    assert codec.calls == []


@pytest.mark.parametrize(
    "changed",
    [
        {"source": Numbers(count=19)},
        {"share": 0.5},
        {"encoders": Encoders(tokenizer="other")},
        {"encoders": Encoders(codec="other")},
    ],
)
def test_a_changed_configuration_is_encoded_again(tmp_path, changed):
    run(tmp_path / "shard")
    codec = Codec()
    info = run(tmp_path / "shard", codec=codec, **changed)
    assert codec.calls == [2]
    assert open_shards(tmp_path / "shard", VOCABULARY).info == info
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_a_failure_keeps_the_previous_shards(tmp_path):
    class Failing(Numbers):
        def documents(self):
            yield from super().documents()
            raise UserError("row 21")

    info = run(tmp_path / "shard")
    with pytest.raises(UserError, match="row 21"):
        run(tmp_path / "shard", source=Failing(count=21))
    assert open_shards(tmp_path / "shard", VOCABULARY).info == info


def test_a_source_without_documents_is_refused(tmp_path):
    with pytest.raises(UserError, match="source 'numbers': there are no documents"):
        run(tmp_path / "shard", source=Numbers(count=0))


def test_special_ids_from_the_tokenizer_are_a_defect(tmp_path):
    with pytest.raises(ValueError, match="special id or an image code for 'n0'"):
        encode_source(
            Numbers(), lambda texts: [[3]] * len(texts), Codec(), VOCABULARY, 0, tmp_path / "shard"
        )


# Rejected rows


def test_rows_that_cannot_be_documents_are_rejected_and_change_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHARACTERS", 5)
    monkeypatch.setattr(chunks, "MAX_IMAGES", 2)
    red = ImageRef("red", partial(Image.new, "RGB", (2, 2), (7, 0, 0)))
    source = Given(
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
    info = run(tmp_path / "shard", source, limits=Limits(max_rejected=1))
    train = open_shards(tmp_path / "shard", VOCABULARY).splits["train"]
    assert train.dataset["name"][:] == ["doc 0", "doc 3", "doc 9"]
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
    assert {line["source"] for line in rejected_in(tmp_path / "shard")} == {"given"}


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
    source = Given(*rows_with(bad, count))
    seen = []
    call = partial(
        run,
        tmp_path / "shard",
        source,
        limits=Limits(shard_tokens=50, max_rejected=share),
        progress=lambda info: seen.append(info.documents_read),
    )
    if stops_at is None:
        assert call().rejected == len(bad)
        return
    first = min(bad)
    with pytest.raises(
        UserError, match=rf"'given': \d+ of {stops_at} documents.*: row {first} is bad"
    ):
        call()
    assert seen[-1] == stops_at
    assert not (tmp_path / "shard").exists()


def test_a_higher_limit_resumes_and_fixed_rows_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 10)
    rows = rows_with(range(100, 110), 200)
    limits = Limits(shard_tokens=50, max_rejected=0.01)
    for folder in ("allowed", "fixed"):
        with pytest.raises(UserError, match="10 of 110 documents"):
            run(tmp_path / folder, Given(*rows), limits=limits)
    seen = []
    info = run(
        tmp_path / "allowed",
        Given(*rows),
        limits=Limits(shard_tokens=50, max_rejected=0.1),
        progress=lambda info: seen.append(info.documents_read),
    )
    assert seen[0] == 100 and info.rejected == 10 and info.whole.total.documents == 190
    with pytest.raises(UserError, match=r"10 of 200 documents.*row 100 is bad"):
        run(tmp_path / "allowed", Given(*rows), limits=limits)
    # All rows are documents now, although the configuration is the same.
    fixed = run(tmp_path / "fixed", Given(*["good"] * 200), limits=limits)
    assert fixed.rejected == 0 and fixed.whole.total.documents == 200
    assert rejected_in(tmp_path / "fixed") == []


def test_rejected_rows_on_disk_are_read_again_after_a_stop(tmp_path):
    rows = rows_with({3}, 10)  # checked at the end, when their part is on disk
    with pytest.raises(UserError, match="1 of 10 documents"):
        run(tmp_path / "shard", Given(*rows))
    assert run(tmp_path / "shard", Given(*["good"] * 10)).whole.total.documents == 10


def test_the_work_per_part_does_not_grow_with_earlier_parts(tmp_path, monkeypatch):
    """Counted by the sums of counts."""
    sums, add = [0], Counts.__add__

    def counted(one, other):
        sums[-1] += 1
        return add(one, other)

    monkeypatch.setattr(Counts, "__add__", counted)
    for count in (20, 40):
        run(tmp_path / str(count), Numbers(count=count), limits=Limits(shard_tokens=1))
        sums.append(0)
    assert sums[1] < 2.2 * sums[0]


def test_rejected_documents_take_bounded_space_in_messages_and_lists(tmp_path):
    """However long their names and reasons are."""
    rows = [Rejected("row " + "r" * 10**6, "é" * 10**6) for _ in range(20)]
    with pytest.raises(UserError) as caught:
        run(tmp_path / "shard", Given(*rows))
    assert len(str(caught.value)) < 2000
    (written,) = (tmp_path / "shard.partial").glob("rejected-*.jsonl*")
    assert written.stat().st_size < 20 * 8000


def test_an_image_without_a_codec_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no codec.*codec_training\.max_documents"):
        encode_source(Numbers(), encode_text, None, VOCABULARY, 0, tmp_path / "shard")


# Workers


class Images:
    """Documents of several images, some of them equal, some unreadable."""

    name = "images"

    def documents(self):
        for number in range(60):
            colors = [(number * 7 % 16, part * 50, 0) for part in range(number % 4)]
            parts = [ImageRef("", partial(Image.new, "RGB", (3, 3), c)) for c in colors]
            if number % 11 == 5:
                # Raises `UserError`; a worker can import it without this file.
                parts.insert(1, ImageRef("", partial(render, "no such object", "flat", 4)))
            yield Document(f"doc {number}", (f"n{number}", *parts))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("codec_in_thread", [False, True])
def test_the_codec_runs_in_its_own_thread_or_the_callers(tmp_path, codec_in_thread):
    codec = Codec()
    run(tmp_path / "shard", Numbers(), codec, codec_in_thread=codec_in_thread)
    assert (codec.threads == {threading.get_ident()}) is not codec_in_thread
    assert len(codec.threads) == 1
    run(tmp_path / "other", Numbers(), codec, codec_in_thread=not codec_in_thread)
    assert contents(tmp_path / "shard") == contents(tmp_path / "other")


def test_the_number_of_workers_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr(tokens, "BATCH_IMAGES", 4)
    limits = Limits(shard_tokens=200, max_rejected=1)
    calls = []
    for workers in (0, 1, 2):
        codec = Codec()
        with ImageReader(partial(square_pixels, size=3), workers, seconds=0) as reader:
            run(tmp_path / str(workers), Images(), codec, limits=limits, reader=reader)
        calls.append(codec.calls)
    assert calls[0] == calls[1] == calls[2]
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(rejected_in(tmp_path / "0")) == 5
    assert len(list((tmp_path / "0").glob("train-*.arrow"))) == 3
