"""Tokens of chunks: compared with a slow reference; one thread uses the tokenizer."""

import threading
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
from moma.data.encode.read_ahead import ImageReader
from moma.data.encode.tokens import Encoder
from moma.errors import UserError
from tests.data.encode.encoding import (
    VOCABULARY,
    Codec,
    Numbers,
    encode_source,
    encode_text,
    run,
    stored,
    to_rgb,
    unreadable,
)
from tests.factories import ListSource

parts = st.sampled_from(["", "a", "schön", "long text of several", None, "unreadable"])


def test_after_an_interruption_a_long_text_is_not_tokenized_to_its_end(monkeypatch):
    monkeypatch.setattr("moma.data.encode.tokens.CALL_CHARACTERS", 1)
    monkeypatch.setattr(chunks, "CHUNKS_PER_BATCH", 1)
    calls, started = [], threading.Event()

    def tokenize(texts):
        calls.append(texts)
        started.set()
        time.sleep(0.05)
        return [[7] for _ in texts]

    def rows():
        yield Document("a", ("x" * 1000,))
        started.wait()
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        ImageReader(to_rgb, workers=0) as reader,
        Encoder(tokenize, None, VOCABULARY, False, split_text=list) as encoder,
    ):
        list(encoder.encode(rows(), reader, chunk_tokens=10))
    assert 0 < len(calls) < 100


def test_pieces_of_a_text_become_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr("moma.data.encode.tokens.CALL_CHARACTERS", 3)
    rows = [Document(str(n), (text,)) for n, text in enumerate(["abcdefg", "", "h", "ijklm"])]
    found = []
    for name, split in (("whole", lambda text: [text]), ("pieces", list)):
        source = ListSource(*rows)
        encode_source(
            source,
            letters,
            None,
            VOCABULARY,
            0.0,
            tmp_path / name / "listed",
            split_text=split,
            max_rejected=0.5,
        )
        found.append(stored(tmp_path / name / "listed")[:])
    assert found[0] == found[1] and len(found[0]["ids"]) == 3


def letters(texts):
    return [[21 + ord(letter) % 8 for letter in text] for text in texts]


@given(st.lists(st.lists(parts, max_size=4), min_size=1, max_size=30), st.integers(2, 9))
@settings(deadline=None, max_examples=40)
def test_random_documents_equal_a_slow_reference(documents, chunk):
    """Texts, images, unreadable and empty documents in any order."""
    rows, expected = [], []
    for number, document in enumerate(documents):
        color = number % 16
        image = ImageRef("", partial(Image.new, "RGB", (2, 2), (color, 0, 0)))
        segments = [
            image if part is None else unreadable("x") if part == "unreadable" else part
            for part in document
        ]
        rows.append(Document(f"doc {number}", tuple(segments)))
        ids = [0]
        for part in document:
            ids += [3, 5 + color, 6, 7, 8, 4] if part is None else encode_text([part])[0]
        if "unreadable" not in document and len(ids) > 1:
            count = document.count(None)
            expected.append({"ids": [*ids, 1], "images": count, "name": rows[-1].name})
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_DOCUMENTS", chunk)
        call = partial(run, Path(folder) / "shard", ListSource(*rows), share=0)
        if not expected:
            with pytest.raises(UserError, match="there are no documents"):
                call(max_rejected=1)
            return
        info = call(max_rejected=1)
        assert list(stored(Path(folder) / "shard")) == expected
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
