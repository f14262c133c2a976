"""Files of shards are opened when they are read, and not all at once."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moma.data.mapped_files import cached_files
from moma.data.shards import open_shards
from moma.errors import UserError
from tests.data.encode.encoding import encode_source
from tests.factories import ListSource, make_vocabulary

VOCABULARY = make_vocabulary(300)
FILES = 30


WORDS = ListSource(*map(str, range(FILES)), name="words")


def make(folder):
    """Encode documents into a file each."""
    encode_source(
        WORDS,
        lambda texts: [[100 + int(text)] * (int(text) + 1) for text in texts],
        None,
        VOCABULARY,
        0,
        folder,
        shard_tokens=1,
    )
    return folder


def expected_ids(row):
    return [0, *[100 + row] * (row + 1), 1]


def opened(folder):
    """Count the files of a folder that this process has mapped, and those it has open."""
    with open("/proc/self/maps") as maps:
        mapped = {line.split()[-1] for line in maps if str(folder) in line}
    handles = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    paths = [os.readlink(handle) for handle in handles if os.path.islink(handle)]
    return len(mapped), sum(str(folder) in path for path in paths)


def test_open_files_are_bounded_and_every_document_is_read(tmp_path):
    folder = make(tmp_path / "words")
    assert len(list(folder.glob("train-*.arrow"))) == FILES
    encoded = open_shards(folder, VOCABULARY, get_file=cached_files(4)).splits["train"]
    assert opened(folder)[0] <= 4
    rows = np.random.default_rng(0).permutation(FILES).tolist()
    for row in rows:
        assert encoded.ids(row).tolist() == expected_ids(row)
        assert encoded.name(row) == f"doc {row}"
        assert opened(folder)[0] <= 4
    unbounded = open_shards(folder, VOCABULARY, get_file=cached_files(FILES)).splits["train"]
    assert opened(folder) == (FILES, 0)  # all of them mapped
    np.testing.assert_array_equal(encoded.lengths, unbounded.lengths)


def test_an_array_of_a_closed_file_stays_valid(tmp_path):
    folder = make(tmp_path / "words")
    encoded = open_shards(folder, VOCABULARY, get_file=cached_files(1)).splits["train"]
    first = encoded.ids(0)
    kept = [encoded.ids(row) for row in range(FILES)]
    assert first.tolist() == expected_ids(0)
    assert [ids.tolist() for ids in kept] == [*map(expected_ids, range(FILES))]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 600)])
def test_a_file_that_is_damaged_after_the_start_is_named(tmp_path, damage):
    folder = make(tmp_path / "words")
    encoded = open_shards(folder, VOCABULARY, get_file=cached_files(1)).splits["train"]
    damage(folder / "train-00000-00003.arrow")
    with pytest.raises(UserError, match=r"train-00000-00003\.arrow: missing or damaged .*--verify"):
        encoded.ids(3)
    assert encoded.ids(4).tolist() == expected_ids(4)


def test_threads_read_the_same_documents(tmp_path):
    folder = make(tmp_path / "words")
    encoded = open_shards(folder, VOCABULARY, get_file=cached_files(2)).splits["train"]
    rows = np.random.default_rng(1).integers(FILES, size=500).tolist()
    with ThreadPoolExecutor(4) as threads:
        found = [ids.tolist() for ids in threads.map(encoded.ids, rows)]
    assert found == [*map(expected_ids, rows)]


def test_files_are_memory_mapped_not_read(tmp_path):
    folder = make(tmp_path / "words")
    before = pa.total_allocated_bytes()
    encoded = open_shards(folder, VOCABULARY).splits["train"]
    encoded.ids(0)
    assert pa.total_allocated_bytes() == before
