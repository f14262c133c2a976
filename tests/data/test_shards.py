"""Opening shards, and messages for those that are refused."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from moma.data.documents import Document
from moma.data.provenance import Encoders
from moma.data.shards import PartRecord, open_shards
from moma.errors import UserError
from tests.data.encode.encoding import encode_source
from tests.factories import ListSource, make_vocabulary

VOCABULARY = make_vocabulary(300)
ENCODERS = Encoders(tokenizer="t1", codec="c1")


WORDS = ListSource(
    *(Document(f"doc {n}", (str(n),), held_out=n % 5 == 4) for n in range(20)), name="words"
)


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "words")


def make(folder, vocabulary=VOCABULARY, encoders=ENCODERS):
    def encode(texts):
        return [[100 + int(text)] for text in texts]

    encode_source(WORDS, encode, None, vocabulary, 0, folder, encoders=encoders)
    return folder


def test_encoded_shards_can_be_opened(folder):
    shards = open_shards(folder, VOCABULARY, ENCODERS)
    assert {split: len(encoded) for split, encoded in shards.splits.items()} == {
        "train": 16,
        "held_out": 4,
    }
    np.testing.assert_array_equal(shards.splits["train"].ids(4), [0, 105, 1])
    (origin,) = shards.splits["train"].origins
    assert origin["vocabulary"] == VOCABULARY.fingerprint
    assert (origin["tokenizer"], origin["codec"], origin["source"]) == ("t1", "c1", "words")


def test_older_data_whose_files_are_numbered_through_can_be_opened(folder):
    text = (folder / "shard.json").read_text()
    for path in folder.glob("*.arrow"):
        path.rename(path.with_name(path.name.replace("-00000-", "-")))
    (folder / "shard.json").write_text(text.replace('"part": 0', '"part": null'))
    assert open_shards(folder, VOCABULARY).splits["train"].name(4) == "doc 5"


def test_another_vocabulary_is_refused_by_name(folder):
    other = replace(VOCABULARY, size=301)
    with pytest.raises(UserError, match=rf"{VOCABULARY.fingerprint}.*size \(300 and 301\)"):
        open_shards(folder, other)


@pytest.mark.parametrize(
    ("encoders", "named"),
    [
        (Encoders(tokenizer="t1", codec="c2"), r"another codec \(c1 and c2\);"),
        (Encoders(tokenizer="t2", codec="c1"), r"another tokenizer \(t1 and t2\);"),
        (Encoders(), r"tokenizer \(t1 and none\), codec \(c1 and none\);"),
    ],
)
def test_other_encoders_are_refused_by_name(folder, encoders, named):
    with pytest.raises(UserError, match=named):
        open_shards(folder, VOCABULARY, encoders)


def test_a_file_of_another_vocabulary_is_refused_by_name(folder, tmp_path):
    other = make(tmp_path / "other", replace(VOCABULARY, size=301))
    (other / "train-00000-00000.arrow").replace(folder / "train-00000-00000.arrow")
    with pytest.raises(UserError, match=r"00000\.arrow: does not belong.*in vocabulary"):
        open_shards(folder, VOCABULARY)


def test_a_file_of_another_codec_is_refused_by_name(folder, tmp_path):
    other = make(tmp_path / "other", encoders=Encoders(tokenizer="t1", codec="c2"))
    (other / "held_out-00000-00000.arrow").replace(folder / "held_out-00000-00000.arrow")
    with pytest.raises(UserError, match=r"held_out-00000-00000\.arrow: .*codec \(c2 and c1\)"):
        open_shards(folder, VOCABULARY)


@pytest.mark.parametrize("checksums", [{"../x": [1, "0" * 64]}, {"x": [1, "0" * 63]}])
def test_a_record_names_files_of_its_folder_and_their_checksums(checksums):
    with pytest.raises(ValueError, match=r"no relative name|64 hexadecimal digits"):
        PartRecord(checksums=checksums)


def test_missing_shards_are_refused(tmp_path):
    with pytest.raises(UserError, match="no complete shards here; run `moma prepare`"):
        open_shards(tmp_path / "words", VOCABULARY)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_by_one_table(path):
    """Keep only the schema: a valid stream without a row."""
    with pa.ipc.open_stream(path.read_bytes()) as stream:
        schema = stream.schema
    with pa.ipc.new_stream(path, schema):
        pass


@pytest.mark.parametrize(
    "spoil",
    [cut, cut_by_one_table, lambda path: path.write_bytes(b""), lambda path: path.unlink()],
)
def test_damaged_shards_are_refused(folder, spoil):
    spoil(folder / "train-00000-00000.arrow")
    with pytest.raises(UserError, match=r"damaged.*run `moma prepare`"):
        open_shards(folder, VOCABULARY)
