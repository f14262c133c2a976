"""Tokens of chunks: compared with a slow reference; one thread uses the tokenizer."""

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moma.data.documents import Document, ImageRef
from moma.data.encode import chunks
from moma.data.encode.source import Limits, encode_source
from moma.data.shards import open_shards
from moma.errors import UserError
from tests.data.encode.test_source import (
    VOCABULARY,
    Codec,
    Given,
    Numbers,
    encode_text,
    run,
    unreadable,
)

parts = st.sampled_from(["", "a", "schön", "long text of several", None, "unreadable"])


@given(st.lists(st.lists(parts, max_size=4), min_size=1, max_size=30), st.integers(2, 9))
@settings(deadline=None, max_examples=40)
def test_random_documents_equal_a_slow_reference(documents, chunk):
    """Texts, images, unreadable and empty documents in any order."""
    rows, expected = [], []
    for number, document in enumerate(documents):
        colour = number % 16
        image = ImageRef("", partial(Image.new, "RGB", (2, 2), (colour, 0, 0)))
        segments = [
            image if part is None else unreadable("x") if part == "unreadable" else part
            for part in document
        ]
        rows.append(Document(f"doc {number}", tuple(segments)))
        ids = [0]
        for part in document:
            ids += [3, 5 + colour, 6, 7, 8, 4] if part is None else encode_text([part])[0]
        if "unreadable" not in document and len(ids) > 1:
            count = document.count(None)
            expected.append({"ids": [*ids, 1], "images": count, "name": rows[-1].name})
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_DOCUMENTS", chunk)
        call = partial(run, Path(folder) / "shard", Given(*rows), share=0)
        if not expected:
            with pytest.raises(UserError, match="there are no documents"):
                call(limits=Limits(max_rejected=1))
            return
        info = call(limits=Limits(max_rejected=1))
        train = open_shards(Path(folder) / "shard", VOCABULARY).splits["train"]
        assert list(train.dataset) == expected
        assert info.rejected == len(rows) - len(expected)


def test_one_thread_at_a_time_uses_the_tokenizer(tmp_path, monkeypatch):
    """Another thread converts its earlier results to ids meanwhile."""
    monkeypatch.setattr(chunks, "CHUNK_DOCUMENTS", 1)
    monkeypatch.setattr(chunks, "CHUNKS_PER_BATCH", 1)
    inside = []

    def watched(texts):
        inside.append(True)
        assert len(inside) == 1
        time.sleep(0.001)
        inside.pop()
        return encode_text(texts)

    encode_source(Numbers(), watched, Codec(), VOCABULARY, 0, tmp_path / "shard")
