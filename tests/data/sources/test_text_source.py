"""Text files and JSON Lines of text."""

import bz2
import gzip
import json
import lzma

import pytest

from moma.data.documents import Rejected, is_held_out
from moma.data.sources import jsonl
from moma.data.sources import text as text_module
from moma.data.sources.text import TextConfig
from moma.errors import UserError
from tests.data.sources.rows import accepted


def source_of(**settings):
    return TextConfig(**settings)


def test_paragraphs_are_documents(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeff\nEins\nzwei\n \n\n\nDrei ä\n\nEins\nzwei".encode())
    documents = list(accepted(source_of(path=path).documents()))
    assert [doc.segments for doc in documents] == [("Eins\nzwei",), ("Drei ä",), ("Eins\nzwei",)]
    assert documents[0].name == documents[2].name != documents[1].name
    assert [doc.row.rpartition(", ")[2] for doc in documents] == ["row 2", "row 7", "row 9"]


def test_several_files_are_read_in_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"from {name}")
    documents = accepted(source_of(path=tmp_path / "*.txt").documents())
    assert [doc.segments for doc in documents] == [("from a",), ("from b",)]


def test_names_do_not_depend_on_the_order(tmp_path):
    paths = [tmp_path / "one.txt", tmp_path / "other.txt"]
    paths[0].write_text("a\n\nb\n\nc")
    paths[1].write_text("new\n\nc\n\nb\n\na")
    one, other = (
        {doc.segments: doc.name for doc in accepted(source_of(path=path).documents())}
        for path in paths
    )
    assert one.items() < other.items()


@pytest.mark.parametrize("suffix", ["jsonl", "NDJSON"])
def test_json_rows_are_documents(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    rows = [{"body": "one\n\ntwo", "text": "no"}, {"text": "x"}, {"body": " "}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    document, *rejected = source_of(path=path, text_key="body").documents()
    assert document.segments == ("one\n\ntwo",)
    assert [row.row for row in rejected] == [f"{path}, row 2", f"{path}, row 3"]
    assert all("needs a text under 'body'" in row.reason for row in rejected)


def test_a_paragraph_that_is_not_utf8_is_rejected(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"fine\n\nbroken\n\xff\n\nfine\n")
    first, rejected, last = source_of(path=path).documents()
    assert first == type(first)(first.name, ("fine",), row=f"{path}, row 1")
    assert last.segments == ("fine",)
    assert isinstance(rejected, Rejected)
    assert rejected.row == f"{path}, row 3"
    assert rejected.reason.startswith("row 4: not UTF-8")


def test_a_file_without_blank_lines_is_split_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "MAX_PARAGRAPH_BYTES", 100)
    lines = [f"line {number}" for number in range(200)]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    documents = list(accepted(source_of(path=tmp_path / "t.txt").documents()))
    assert len(documents) > 10
    assert "\n".join(str(doc.segments[0]) for doc in documents).split("\n") == lines


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_a_line_over_the_limit_is_rejected_and_the_next_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(jsonl, "MAX_ROW_BYTES", 100)
    good = '{"text": "good"}\n\n'
    (tmp_path / name).write_text(good + "x" * 1000 + "\n\n" + good)
    first, rejected, last = source_of(path=tmp_path / name).documents()
    assert first.segments == last.segments
    assert rejected.row.endswith("row 3") and "longer than" in rejected.reason
    assert last.row.endswith("row 5")


@pytest.mark.parametrize("name", ["nowhere.txt", "no*.txt"])
def test_a_missing_file_is_an_error(tmp_path, name):
    source = source_of(path=tmp_path / name)
    for ask in (lambda: list(source.documents()), source.fingerprint):
        with pytest.raises(UserError, match=r"/no.*check the source's 'path'"):
            ask()


def test_pieces_of_a_paragraph_are_held_out_together(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "MAX_PARAGRAPH_BYTES", 30)
    long = "\n".join(f"line {number}" for number in range(50))
    (tmp_path / "t.txt").write_text(f"short\n\n{long}\n\nother")
    short, *pieces, other = accepted(source_of(path=tmp_path / "t.txt").documents())
    assert len(pieces) > 10
    for share in (n / 20 for n in range(20)):
        assert len({is_held_out(piece, share) for piece in pieces}) == 1
    assert {d.held_out_with for d in (short, pieces[0], other)} == {""}


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_a_zero_byte_is_kept(tmp_path, name):
    row = json.dumps({"text": "a\0b"}) if name == "t.jsonl" else "a\0b"
    (tmp_path / name).write_text(row)
    (document,) = accepted(source_of(path=tmp_path / name).documents())
    assert document.segments == ("a\0b",)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_file_is_an_error(tmp_path, compress):
    (tmp_path / "t.jsonl").write_bytes(compress(b'{"text": "a"}'))
    with pytest.raises(UserError, match=r"t\.jsonl: .*it is compressed\); decompress it first"):
        list(source_of(path=tmp_path / "t.jsonl").documents())
