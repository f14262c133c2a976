"""`moma data inspect`: counts compared with the shards, and decoded documents."""

import numpy as np
import pytest
import torch
from PIL import Image

from moma.data.encode.prepare import prepare
from moma.data.encode.source import SourceEncoding
from moma.data.inspect import (
    decode_document,
    document_as_text,
    inspect,
    lengths_as_text,
)
from moma.data.shards import open_shards
from moma.errors import UserError
from moma.tokenizers.image.codec import ImageCodec, preprocess, to_pil
from moma.vocabulary import IMAGE, Vocabulary


@pytest.fixture(scope="module")
def shards(tiny):
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    return {name: open_shards(tiny.data.folder(name), vocabulary) for name in ("captions", "text")}


def test_what_exists_of_an_unfinished_source_is_described(tiny, tmp_path, monkeypatch):
    data = tiny.data.model_copy(update={"path": tmp_path / "data", "part_bytes": 1})
    recipe = tiny.model_copy(update={"data": data})
    add = SourceEncoding.add

    def stop(encoding, shards, number, records):
        add(encoding, shards, number, records)
        if number == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SourceEncoding, "add", stop)
        prepare(recipe, torch.device("cpu"), quiet=True)
    with pytest.raises(UserError, match="nothing is complete yet"):
        inspect(data.path, "text", tmp_path)
    found = inspect(data.path, "captions", tmp_path)["sources"]["captions"]
    assert found["documents"] == 4
    document = decode_document(data.path, "captions", "train", 1, tmp_path)
    prepare(recipe, torch.device("cpu"), quiet=True)
    assert decode_document(data.path, "captions", "train", 1, tmp_path) == document


def test_counts_are_those_of_every_token(tiny, shards, tmp_path):
    result = inspect(tiny.data.path, None, tmp_path)
    vocabulary = Vocabulary.load(tiny.data.path / "vocabulary.json")
    sums = dict.fromkeys(("documents", "tokens", "text_tokens", "image_tokens", "images"), 0)
    for name, opened in shards.items():
        rows = [
            encoded.ids(row) for encoded in opened.splits.values() for row in range(len(encoded))
        ]
        ids = np.concatenate(rows)
        image = vocabulary.modality_of_id[ids] == IMAGE
        counted = {
            "documents": len(rows),
            "tokens": len(ids),
            "text_tokens": int((~image).sum()),
            "image_tokens": int(image.sum()),
            "images": int((ids == vocabulary.begin_image).sum()),
        }
        one = result["sources"][name]
        assert {key: one[key] for key in counted} == counted
        assert one["rejected"] == 0
        assert one["splits"]["held_out"]["documents"] == len(opened.splits["held_out"])
        for start, count in zip(one["lengths"]["from"], one["lengths"]["documents"], strict=True):
            assert count == sum(start <= len(row) < 2 * start for row in rows)
        assert sum(one["lengths"]["documents"]) == len(rows)
        sums = {key: sums[key] + counted[key] for key in sums}
    assert {key: result[key] for key in sums} == sums
    assert Image.open(result["figure"]).format == "PNG"
    assert lengths_as_text(result).count("█") > 2


def test_one_source_can_be_inspected(tiny, tmp_path):
    assert inspect(tiny.data.path, "text", tmp_path)["sources"].keys() == {"text"}


def test_a_document_is_decoded_to_text_and_images(tiny, shards, tmp_path):
    encoded = shards["captions"].splits["train"]
    for number in range(1, 5):
        decoded = decode_document(tiny.data.path, "captions", "train", number, tmp_path)
        assert decoded["name"] == encoded.name(number - 1)
        assert sorted(segment["type"] for segment in decoded["segments"]) == ["image", "text"]
        (text,) = (one["text"] for one in decoded["segments"] if one["type"] == "text")
        assert text.startswith("a ") and text.endswith(" square")
        (path,) = (one["image"] for one in decoded["segments"] if one["type"] == "image")
        # The image is the codec's reconstruction of the original.
        codec = ImageCodec.load(tiny.data.path / "codec")
        original = Image.open(tiny.data.sources[0].path / decoded["name"])
        codes = codec.encode(preprocess(original, 16)[None])
        assert Image.open(path).tobytes() == to_pil(codec.decode(codes)[0]).tobytes()
        assert path in document_as_text(decoded) and text in document_as_text(decoded)


def test_text_is_decoded_exactly(tiny, shards, tmp_path):
    sentences = set((tiny.data.sources[1].path).read_text().strip().split("\n\n"))
    for split, encoded in shards["text"].splits.items():
        for number in range(1, len(encoded) + 1):
            decoded = decode_document(tiny.data.path, "text", split, number, tmp_path)
            (text,) = (one["text"] for one in decoded["segments"])
            assert text in sentences
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "split", "number", "named"),
    [
        (None, "train", 1, "--source with one of captions, text"),
        ("words", "train", 1, "--source words.*captions, text"),
        ("text", "test", 1, "--split test: use train or held_out"),
        ("text", "train", 0, r"--document 0: text has the documents 1 to \d+"),
        ("text", "train", 10_000, r"--document 10000: text has the documents 1 to \d+"),
    ],
)
def test_a_missing_source_split_or_document_is_named(tiny, tmp_path, source, split, number, named):
    with pytest.raises(UserError, match=named):
        decode_document(tiny.data.path, source, split, number, tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"not a data folder .*; name one that `moma prepare` wrote"
    ):
        inspect(tmp_path, None, tmp_path)


def test_a_recipe_instead_of_a_data_folder_is_refused(tmp_path):
    recipe = tmp_path / "mine.toml"
    for text, hint in (
        ('[data]\npath = "data/mine"\n', "this recipe's data folder is data/mine"),
        ("data = 3", "name one that `moma prepare` wrote"),
    ):
        recipe.write_text(text)
        with pytest.raises(UserError, match=f"is a file, not a data folder; {hint}"):
            inspect(recipe, None, tmp_path)
        with pytest.raises(UserError, match=f"is a file, not a data folder; {hint}"):
            decode_document(recipe, None, "train", 1, tmp_path)
