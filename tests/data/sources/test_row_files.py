"""Text files as rows of a data set: CSV, TSV, JSON, JSON Lines, plain lines; also compressed."""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable

import pyarrow as pa
import pytest

from moma.data.sources import row_files
from moma.data.sources.dataset import DatasetConfig
from moma.data.sources.jsonl import decompress
from moma.errors import UserError
from tests.data.sources.rows import segments


def source_of(**options):
    return DatasetConfig(**options)


def write_csv(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return source_of(path=str(path))


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ("text,id\na,1,\nb,2,\n", ["a", "b"]),
        ("text,id,\na,1,\nb,2,\n", ["a", "b"]),
        ("text,id\na,1\nb\n", ["a", "b"]),
        (
            "text\nNA\nnull\n007\n1.50\nTrue\n2020-01-01\n",
            ["NA", "null", "007", "1.50", "True", "2020-01-01"],
        ),
        ("id,id,text\n1,2,a\n", ["a"]),
        ("id,text\n1,#a\n", ["#a"]),
        ('id,text\n1,"a, ""b""\nc"\n', ['a, "b"\nc']),
        ('text\na "b" c\n', ['a "b" c']),
        ("\ufefftext,id\na,1\n", ["a"]),
        ("\ufefftext\tx\r\nä\t1\r\n".encode("utf-16-le"), ["ä"]),
        ("text\r\na\r\n\r\nb\r\n", ["a", "b"]),
        ("text\ra\rb", ["a", "b"]),
        (b"id,text\n\xff,a\n", ["a"]),
    ],
)
def test_csv_is_read_as_it_is_written(tmp_path, data, texts, folder):
    name = "a.tsv" if isinstance(data, bytes) and b"\t\0" in data else "a.csv"
    (tmp_path / "rows").mkdir()
    source = write_csv(tmp_path / "rows" / name, data)
    if folder:
        source = source_of(path=str(tmp_path / "rows"))
    assert segments(source.documents()) == texts


@pytest.mark.parametrize(
    ("rows", "rejected"),
    [
        (["a,b,c"], {2: "has 3 fields, but the header names 2 columns"}),
        (["1,\xff"], {2: "under 'text' is not valid Unicode"}),
        (["1"], {2: "has no 'text'"}),
        (["1,"], {2: "needs a text"}),
        (['1,"a"b'], {2: "not valid CSV"}),
        (['1,"a', "2,b", '3,"c"'], {n: "not valid CSV" for n in (2, 3, 4)}),
    ],
)
def test_rows_of_csv_that_do_not_fit_are_rejected(tmp_path, rows, rejected):
    lines = ["id,text", *rows, "9,good"]
    source = write_csv(tmp_path / "a.csv", "\n".join(lines).encode("latin-1"))
    *found, good = source.documents()
    assert [row.row for row in found] == [f"{source.path}, line {n}" for n in rejected]
    assert all(want in row.reason for want, row in zip(rejected.values(), found, strict=True))
    assert good.segments == ("good",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text,text\na,b\n", "has several columns 'text'"),
        ("text;id\na;b\n", "has no column 'text'; the columns, separated by ',', are: text;id"),
        ("", "is empty"),
        ('text\na\n"b\nc\nd\n', r"line 3: not valid CSV \(unexpected end of data\)"),
    ],
)
def test_csv_that_cannot_be_read_is_an_error(tmp_path, data, message):
    with pytest.raises(UserError, match=message):
        list(write_csv(tmp_path / "a.csv", data).documents())


def test_a_row_of_many_quoted_lines_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 100)
    short = "text\n" + '"a\nb"\n' * 50
    assert len(list(write_csv(tmp_path / "short.csv", short).documents())) == 50
    endless = "text,id\na,1\n" + '"b\n",' * 30
    with pytest.raises(UserError, match=r"line 3: longer than .* split the row, or close"):
        list(write_csv(tmp_path / "endless.csv", endless).documents())


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.ndjson", '{"text": "a"}\n{"text": "2020-01-01"}\n'),
        ("a.txt", "a\n\n2020-01-01\n"),
        ("a.tsv", "text\tid\na\t1\n2020-01-01\t2\n"),
        ("a.json", '{"text": "a"}\n{"text": "2020-01-01"}\n'),
        ("a.json", '\ufeff[{"text": "a"},\n {"text": "2020-01-01", "x": [1, {}]}]\n'),
        ("a.json", '["a", "2020-01-01"]'),
        ("a.json", '{\n"text": [\n"a", "2020-01-01"],\n"id": [1, 2]}'),
    ],
)
@pytest.mark.parametrize("compress", [None, gzip.compress, bz2.compress, lzma.compress, "zst"])
@pytest.mark.parametrize("streaming", [False, True])
def test_text_files_are_read_compressed_or_not(tmp_path, name, data, compress, streaming):
    content = data.encode()
    if compress == "zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    elif compress is not None:
        content = compress(content)
    path = tmp_path / (name if compress is None else f"{name}.gz")
    path.write_bytes(content)
    rows = source_of(path=str(path), streaming=streaming).documents()
    assert segments(rows) == ["a", "2020-01-01"]


def test_a_long_json_array_is_read_item_by_item(tmp_path):
    texts = ["x" * n for n in (1, 200_000, 3)] + [str(n) for n in range(30_000)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    assert segments(source_of(path=str(tmp_path / "a.json")).documents()) == texts


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"text": "a"}, {"text": }]', "row 2: not valid JSON"),
        ('[{"text": "a"}, {"text": "b"}', "row 3: not valid JSON"),
        ('{\n"text": [\n', "not valid JSON"),
        ('[{"text": "a"}]\n[{"text": "b"}]\n', "has text after its JSON array"),
    ],
)
def test_a_broken_json_file_is_an_error(tmp_path, data, message):
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(UserError, match=message):
        list(source_of(path=str(tmp_path / "a.json")).documents())


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.md"])
def test_a_local_file_with_an_unknown_ending_is_named(tmp_path, name):
    (tmp_path / name).write_text("a")
    with pytest.raises(UserError, match=r"cannot be read; those that can end in jsonl, .*arrow"):
        list(source_of(path=str(tmp_path / name)).documents())


def test_a_damaged_compressed_file_is_an_error(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot read it"):
        list(source_of(path=str(tmp_path / "a.jsonl.gz")).documents())


_SKIPPED = b"\x5f\x2a\x4d\x18\x03\0\0\0abc"  # a frame of Zstandard that holds no content
_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def streams_of(ending, *texts):
    return [_COMPRESSORS[ending](b"".join(b"%d\n" % n for n in text)) for text in texts]


@pytest.mark.parametrize(
    ("ending", "before", "between"),
    [
        *((ending, b"", b"") for ending in _COMPRESSORS),
        ("gz", b"", b"\0" * 8),
        ("xz", b"", b"\0" * 4),
        ("xz", b"", b"\0" * 200_000),
        ("bz2", bz2.compress(b""), b""),
        ("zst", _SKIPPED, _SKIPPED),
    ],
)
def test_every_stream_of_a_compressed_file_is_read(tmp_path, ending, before, between):
    numbers = [*range(40_000)]
    parts = streams_of(ending, numbers[:30_000], numbers[30_000:39_999], numbers[39_999:])
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(before + between.join(parts) + between)
    assert segments(source_of(path=str(path)).documents()) == [*map(str, numbers)]


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_compressed_data_cannot_be_sought_from_its_end(tmp_path, compress):
    path = tmp_path / "a"
    path.write_bytes(compress(b"abc"))
    with path.open("rb") as file, decompress(file) as content:
        with pytest.raises(io.UnsupportedOperation, match="from the end"):
            content.seek(-1, io.SEEK_END)
        assert content.seek(1) == 1 and content.read() == b"bc"


@pytest.mark.parametrize("ending", _COMPRESSORS)
@pytest.mark.parametrize("damage", ["header", "between", "after", "cut", "begun"])
def test_damage_after_the_first_stream_is_an_error(tmp_path, ending, damage):
    first, second = streams_of(ending, range(3), range(3, 6))
    damaged = {
        "header": first + bytes([second[0] ^ 1]) + second[1:],
        "between": first + b"XXXX" + second,
        "after": first + second + b"XXXXXXXXXXXX",
        "cut": first + second[:-3],
        "begun": first + second[:3],
    }
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=rf"a\.txt\.{ending}: cannot read it"):
        list(source_of(path=str(path)).documents())
