"""Encoding: what a document becomes, when it is done again, and what opening refuses."""

from dataclasses import replace
from functools import partial
from typing import Literal

import datasets
import numpy as np
import pytest
from PIL import Image

from moma.data import encoding
from moma.data.documents import Document, Picture
from moma.data.encoding import encode_source, open_shards
from moma.errors import UserError
from moma.recipe import Config
from moma.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    size=300,
    beginning=0,
    end=1,
    padding=2,
    begin_image=3,
    end_image=4,
    image_codes=tuple(range(5, 21)),
    codes_per_image=4,
)


class Numbers(Config):
    """Documents `n0`, `n1`, …; every third has a picture, one of two."""

    kind: Literal["numbers"] = "numbers"
    name: str = "numbers"
    weight: float = 1.0
    count: int = 20

    def documents(self):
        for number in range(self.count):
            picture = Picture(f"p{number}", partial(Image.new, "L", (2, 2), number % 2 * 9))
            segments = (f"n{number}", picture, "!") if number % 3 == 0 else (f"n{number}",)
            yield Document(f"doc {number}", segments, held_out=number % 5 == 4)


def encode_text(texts):
    return [[30 + byte for byte in text.encode()] for text in texts]


class Codec:
    def __init__(self):
        self.calls = []

    def __call__(self, pictures):
        self.calls.append(len(pictures))
        return np.array([[picture.getpixel((0, 0)), 1, 2, 3] for picture in pictures])


def run(folder, source=None, codec=None, share=0.02, **options):
    return encode_source(
        source or Numbers(), encode_text, codec or Codec(), VOCABULARY, share, folder, **options
    )


def test_a_document_is_text_and_wrapped_pictures_between_beginning_and_end(tmp_path):
    info = run(tmp_path / "shard")
    train, held_out = open_shards(tmp_path / "shard", VOCABULARY).splits.values()
    assert (len(train), len(held_out)) == (16, 4)
    expected = [0, *encode_text(["n3"])[0], 3, 5 + 9, 6, 7, 8, 4, *encode_text(["!"])[0], 1]
    assert train.ids(3).tolist() == expected
    assert train.ids(1).tolist() == [0, *encode_text(["n1"])[0], 1]
    assert train.dataset[3] == {"ids": expected, "pictures": 1, "name": "doc 3"}
    assert train.dataset.features["ids"] == datasets.List(datasets.Value("uint16"))
    assert held_out.dataset["name"][:] == ["doc 4", "doc 9", "doc 14", "doc 19"]
    assert info.counts["train"].documents == 16
    assert info.counts["train"].tokens == sum(len(train.ids(row)) for row in range(16))
    assert info.counts["train"].pictures == train.pictures.sum()


def test_equal_pictures_of_a_chunk_are_encoded_once(tmp_path):
    codec = Codec()
    run(tmp_path / "shard", codec=codec)
    assert codec.calls == [2]


def test_rows_are_found_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_DOCUMENTS", 3)
    monkeypatch.setattr(encoding, "BATCH_PICTURES", 1)
    codec = Codec()
    written: list[int] = []
    run(tmp_path / "shard", codec=codec, progress=written.append)
    train, held_out = open_shards(tmp_path / "shard", VOCABULARY).splits.values()
    assert written == [3] * 6 + [2]
    assert codec.calls == [1] * 7
    for shard in (train, held_out):
        for row in range(len(shard)):
            assert shard.ids(row).tolist() == shard.dataset[row]["ids"]


def test_an_empty_split_can_be_opened(tmp_path):
    run(tmp_path / "shard", source=Numbers(count=3))
    assert len(open_shards(tmp_path / "shard", VOCABULARY).splits["held_out"]) == 0


def test_what_is_complete_is_not_done_again(tmp_path):
    info, codec = run(tmp_path / "shard"), Codec()
    assert run(tmp_path / "shard", Numbers(weight=3), codec) == info
    assert codec.calls == []


@pytest.mark.parametrize(
    "changed", [{"source": Numbers(count=19)}, {"share": 0.5}, {"encoders": "other"}]
)
def test_other_settings_are_encoded_anew(tmp_path, changed):
    run(tmp_path / "shard")
    codec = Codec()
    info = run(tmp_path / "shard", codec=codec, **changed)
    assert codec.calls == [2]
    assert open_shards(tmp_path / "shard", VOCABULARY).info == info


def test_a_failure_leaves_what_was_there(tmp_path):
    class Failing(Numbers):
        def documents(self):
            yield from super().documents()
            raise UserError("row 21")

    info = run(tmp_path / "shard")
    with pytest.raises(UserError, match="row 21"):
        run(tmp_path / "shard", source=Failing(count=21))
    assert open_shards(tmp_path / "shard", VOCABULARY).info == info
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_another_vocabulary_is_refused_by_name(tmp_path):
    run(tmp_path / "shard")
    other = replace(VOCABULARY, size=301)
    with pytest.raises(UserError, match=rf"{VOCABULARY.fingerprint}.*size \(300 and 301\)"):
        open_shards(tmp_path / "shard", other)


def test_missing_and_empty_are_refused(tmp_path):
    with pytest.raises(UserError, match="no complete shards here; run `moma prepare`"):
        open_shards(tmp_path / "shard", VOCABULARY)
    with pytest.raises(UserError, match="source 'numbers': it has no documents"):
        run(tmp_path / "shard", source=Numbers(count=0))


def test_damaged_shards_are_refused(tmp_path):
    run(tmp_path / "shard")
    path = tmp_path / "shard" / "train.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        open_shards(tmp_path / "shard", VOCABULARY)


def test_special_ids_from_the_tokenizer_are_a_defect(tmp_path):
    with pytest.raises(ValueError, match="special id or an image code for 'n0'"):
        encode_source(
            Numbers(), lambda texts: [[3]] * len(texts), Codec(), VOCABULARY, 0, tmp_path / "shard"
        )
