"""Encoding a source: tokens of documents, files, workers, and repeated calls."""

import threading
from dataclasses import replace
from functools import partial

import datasets
import pytest
from PIL import Image

from moma.data.documents import Document, ImageRef, SourceConfig
from moma.data.encode import chunks, tokens
from moma.data.encode.read_ahead import ImageReader
from moma.data.provenance import Encoders
from moma.data.shards import open_shards
from moma.demo.drawings import render
from moma.errors import UserError
from moma.images import square_pixels
from tests.data.encode.encoding import (
    VOCABULARY,
    Codec,
    Numbers,
    encode_source,
    encode_text,
    rejected_in,
    run,
    stored,
)
from tests.factories import ListSource


def test_a_document_is_text_and_wrapped_images_between_beginning_and_end(tmp_path):
    info = run(tmp_path / "shard")
    train, held_out = open_shards(tmp_path / "shard", VOCABULARY).splits.values()
    assert (len(train), len(held_out)) == (16, 4)
    expected = [0, *encode_text(["n3"])[0], 3, 5 + 9, 6, 7, 8, 4, *encode_text(["!"])[0], 1]
    assert train.ids(3).tolist() == expected
    assert train.ids(1).tolist() == [0, *encode_text(["n1"])[0], 1]
    rows = stored(tmp_path / "shard")
    assert rows[3] == {"ids": expected, "images": 1, "name": "doc 3"}
    assert rows.features["ids"] == datasets.List(datasets.Value("uint16"))
    assert [held_out.name(row) for row in range(4)] == ["doc 4", "doc 9", "doc 14", "doc 19"]
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
        shard_tokens=shard_tokens,
        progress=lambda info: seen.append(info.documents_read),
    )
    assert seen == [0, 3, 6, 9, 12, 15, 18, 20]
    assert codec.calls == [1] * 7
    # A part ends with the chunk that fills it, and they cover the rows without gap or overlap.
    assert [part.first for part in info.parts] == [0, *[part.stop for part in info.parts][:-1]]
    for part in info.parts[:-1]:
        assert sum(counts.tokens for counts in part.counts.values()) >= shard_tokens
    assert (len(info.parts) == 1) == (shard_tokens == 10_000)
    for split, encoded in open_shards(tmp_path / "shard", VOCABULARY).splits.items():
        expected = stored(tmp_path / "whole", split)
        assert len(encoded) == len(expected)
        assert stored(tmp_path / "shard", split)[:] == expected[:]
        assert encoded.lengths.tolist() == [len(ids) for ids in expected["ids"]]
        for row in range(len(encoded)):
            assert encoded.ids(row).tolist() == expected[row]["ids"]
            assert not encoded.ids(row).flags.owndata


def test_a_file_exceeds_its_size_by_at_most_one_document(tmp_path):
    info = run(tmp_path / "shard", shard_tokens=1)
    assert [part.stop for part in info.parts] == list(range(1, 21))
    info = run(tmp_path / "larger", shard_tokens=40)
    longest = 11
    for part in info.parts[:-1]:
        assert 40 <= sum(counts.tokens for counts in part.counts.values()) < 2 * 40 + longest


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65537, "uint32")])
def test_ids_take_the_smallest_type(tmp_path, size, dtype):
    vocabulary = replace(VOCABULARY, size=size)
    last = lambda texts: [[size - 1] for _ in texts]  # noqa: E731
    encode_source(ListSource("a"), last, None, vocabulary, 0, tmp_path / "shard")
    ids = open_shards(tmp_path / "shard", vocabulary).splits["train"].ids(0)
    assert ids.dtype == dtype and ids.tolist() == [0, size - 1, 1]


def test_an_empty_split_can_be_opened(tmp_path):
    run(tmp_path / "shard", source=Numbers(count=3))
    held_out = open_shards(tmp_path / "shard", VOCABULARY).splits["held_out"]
    assert len(held_out) == len(held_out.images) == len(held_out.lengths) == 0


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


# Workers


class Images(SourceConfig):
    """Documents of several images, some of them equal, some unreadable."""

    name: str = "images"

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
    limits = {"shard_tokens": 200, "max_rejected": 1}
    calls = []
    for workers in (0, 1, 2):
        codec = Codec()
        with ImageReader(partial(square_pixels, size=3), workers, seconds=0) as reader:
            run(tmp_path / str(workers), Images(), codec, **limits, reader=reader)
        calls.append(codec.calls)
    assert calls[0] == calls[1] == calls[2]
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(rejected_in(tmp_path / "0")) == 5
    assert len(list((tmp_path / "0").glob("train-*.arrow"))) == 3
