"""Parts of sources: together the documents of the whole source, wherever they are cut."""

import gzip
import json
import os
from unittest.mock import Mock

import pyarrow as pa
import pytest

from moma.data.documents import Document, ImageRef, Rejected, SourceConfig, SourcePart
from moma.data.sources import parts as parts_module
from moma.data.sources.arrow_tables import row_group_cuts
from moma.data.sources.captions import CaptionsConfig
from moma.data.sources.dataset import DatasetConfig
from moma.data.sources.folder import FolderConfig
from moma.data.sources.html import HtmlConfig
from moma.data.sources.interleaved import InterleavedConfig
from moma.data.sources.listings import Listings
from moma.data.sources.text import TextConfig
from moma.data.sources.webdataset import WebDatasetConfig
from moma.errors import UserError
from tests.factories import image_bytes, write_captions, write_pages, write_parquet, write_tar

ROWS = 30


def described(rows):
    """Everything about documents that a user sees, and the pixels of their images."""
    for row in rows:
        if isinstance(row, Rejected):
            yield row.row, row.reason
        else:
            segments = [
                (segment.name, segment.read().tobytes())
                if isinstance(segment, ImageRef)
                else segment
                for segment in row.segments
            ]
            yield row.name, row.row, row.held_out_with, segments


def json_lines(path, rows, bad=()):
    lines = ["not JSON" if n in bad else json.dumps(row) for n, row in enumerate(rows)]
    # Blank lines are no rows, but count as lines.
    path.write_text("\n".join(line + "\n" * (n % 5 == 2) for n, line in enumerate(lines)) + "\n")


def texts(folder):
    for name in ("a", "b", "c"):
        json_lines(folder / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(ROWS)], {7})
    return TextConfig(path=folder / "*.jsonl")


def paragraphs(folder):
    """Paragraphs of one to three lines, with line ends of both systems, and blank lines."""
    for name, end in (("a", "\n"), ("b", "\r\n")):
        lines = []
        for number in range(ROWS):
            lines += [f"{name} {number} {line}" for line in range(number % 3 + 1)]
            lines += ["", "  ", ""][: number % 3 + 1]
        (folder / f"{name}.txt").write_text(end.join(lines), newline="")
    return TextConfig(path=folder / "*.txt")


def captions(folder):
    names = [f"{number}.png" for number in range(ROWS)]
    write_captions(folder, dict.fromkeys(names, "c"), dict.fromkeys(names, image_bytes()))
    return CaptionsConfig(path=folder)


def captions_in_metadata(folder):
    source = captions(folder)
    (folder / "captions.jsonl").rename(folder / "metadata.jsonl")
    return source


def folder_of_images(folder):
    for number in range(ROWS):
        (folder / f"{number}.png").write_bytes(image_bytes())
        if number != 7:
            (folder / f"{number}.txt").write_text(f"c{number}")
    return FolderConfig(path=folder)


def tars(folder):
    for name in ("a", "b", "c"):
        files: dict[str, bytes] = {}
        for number in range(10):
            files |= {f"{name}{number}.png": image_bytes(), f"{name}{number}.txt": b"c"}
        write_tar(folder / f"{name}.tar", files.items())
    return WebDatasetConfig(path=folder / "*.tar")


def interleaved(folder):
    rows = [{"texts": ["t", None], "images": [None, f"{n % 4}.png"]} for n in range(ROWS)]
    for number in range(4):
        (folder / f"{number}.png").write_bytes(image_bytes())
    json_lines(folder / "a.jsonl", rows, {7})
    return InterleavedConfig(path=folder / "a.jsonl")


def parquet(folder):
    for name in ("a", "b"):
        rows = [
            {"image": {"bytes": image_bytes(), "path": None}, "text": f"{name} {n}", "other": n}
            for n in range(ROWS)
        ]
        rows[7]["text"] = ""
        write_parquet(folder / f"{name}.parquet", rows, row_group_size=4)
    return DatasetConfig(path=str(folder / "*.parquet"), image_column="image")


def arrow(folder):
    table = pa.table({"text": [f"t{n}" for n in range(100)]})
    with pa.ipc.new_stream(folder / "a.arrow", table.schema) as file:
        file.write_table(table)
    return DatasetConfig(path=str(folder / "a.arrow"))


def rows_of_files(folder):
    for name in ("a", "b"):
        json_lines(folder / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(ROWS)], {7})
    return DatasetConfig(path=str(folder / "*.jsonl"))


SOURCES = [
    *(texts, paragraphs, captions, captions_in_metadata, folder_of_images, tars, interleaved),
    *(parquet, arrow, rows_of_files),
]


@pytest.mark.parametrize("make", SOURCES)
@pytest.mark.parametrize("part_bytes", [1, 150, 10**12])
def test_parts_are_together_the_whole_source(tmp_path, monkeypatch, make, part_bytes):
    monkeypatch.setattr(parts_module, "BLOCK_BYTES", 7)
    source = make(tmp_path)
    expected = [*described(source.documents())]
    assert len(expected) >= ROWS
    cut = source.parts(part_bytes)
    assert (len(cut) == 1) == (part_bytes == 10**12)
    # Any order, as processes would read them.
    found = {n: [*described(source.read_part(cut[n]))] for n in reversed(range(len(cut)))}
    assert [row for n in range(len(cut)) for row in found[n]] == expected
    assert source.parts(part_bytes) == cut
    assert SourcePart.model_validate_json(cut[-1].model_dump_json()) == cut[-1]


@pytest.mark.parametrize("make", SOURCES)
def test_files_are_listed_once_for_all_parts(tmp_path, monkeypatch, make):
    source, scandir = make(tmp_path), Mock(wraps=os.scandir)
    cut = source.parts(150)
    monkeypatch.setattr(os, "scandir", scandir)
    listings = Listings()
    for part in cut:
        with listings:
            [*source.read_part(part)]
    listed = [folder for (folder,), _ in scandir.call_args_list]
    assert len(listed) == len({*listed})
    assert len(cut) > 1


def test_listings_are_not_entered_between_items(tmp_path):
    source, listings = texts(tmp_path), Listings()
    listings_of = [len([*source.documents()])]
    for _ in listings.inside(source.documents()):
        (tmp_path / "d.jsonl").write_text('{"text": "added"}\n')
        listings_of.append(len([*source.documents()]))
    assert {*listings_of[1:]} == {listings_of[0] + 1}


def test_other_listings_see_files_that_were_added(tmp_path):
    source = texts(tmp_path)
    with Listings():
        before = [*source.documents()]
        (tmp_path / "d.jsonl").write_text('{"text": "added"}\n')
        assert [*source.documents()] == before
        with Listings():
            assert len([*source.documents()]) == len(before) + 1
    assert len([*source.documents()]) == len(before) + 1


@pytest.mark.parametrize("make", [texts, paragraphs, rows_of_files])
def test_parts_have_about_the_size_that_is_asked_for(tmp_path, make):
    source = make(tmp_path)
    sizes = [part.size for part in source.parts(100)]
    assert len(sizes) > 5
    assert all(100 <= size < 200 for size in sizes[:-1])
    assert sum(sizes) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_images_that_rows_name_count(tmp_path):
    source = captions(tmp_path)
    assert len(source.parts(10 * 2**17)) == 3
    assert len(interleaved(tmp_path).parts(10 * 2**17)) == 4  # with five blank lines


def test_only_whole_compressed_files_are_read(tmp_path):
    for name in ("a", "b"):
        data = "".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(ROWS))
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(data.encode()))
    source = DatasetConfig(path=str(tmp_path / "*.jsonl.gz"))
    assert [(part.first, part.stop, part.end) for part in source.parts(1)] == [
        (0, 1, None),
        (1, 2, None),
    ]


def test_streams_pages_and_sources_without_files_are_one_part(tmp_path):
    write_pages(tmp_path, {"a.html": "<p>a</p>"})
    assert HtmlConfig(path=tmp_path).parts(1) == [SourcePart()]
    assert parquet(tmp_path).model_copy(update={"streaming": True}).parts(1) != [SourcePart()]
    ranged = parquet(tmp_path).model_copy(update={"streaming": True, "split": "train[:3]"})
    assert ranged.parts(1) == [SourcePart()]

    class Two(SourceConfig):
        def documents(self):
            yield Document("a", ("a",))

    assert [row for part in Two().parts(1) for row in Two().read_part(part)] == [
        Document("a", ("a",))
    ]


def test_files_that_were_added_meanwhile_are_noticed(tmp_path):
    source = texts(tmp_path)
    cut = source.parts(10**3)
    (tmp_path / "0.jsonl").write_text('{"text": "new"}\n')
    with pytest.raises(UserError, match=r"added or removed while they were being prepared"):
        [*source.read_part(cut[-1])]


@pytest.mark.parametrize(("old", "new"), [("b", "bb"), ("c", "cc")])
def test_a_change_after_the_first_file_of_a_part_is_noticed(tmp_path, old, new):
    """As many files as before begin with the same one."""
    source = texts(tmp_path)
    (part,) = source.parts(10**12)
    (tmp_path / f"{old}.jsonl").rename(tmp_path / f"{new}.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl: .* added or removed"):
        [*source.read_part(part)]


def test_a_file_between_those_of_a_part_is_noticed(tmp_path):
    source = texts(tmp_path)
    moved = (tmp_path / "b.jsonl").rename(tmp_path / "b")
    (part,) = source.parts(10**12)
    assert part.stop == 2
    moved.rename(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"added or removed"):
        [*source.read_part(part)]


@pytest.mark.parametrize("used", ["a.text", "a"])
def test_parquet_is_cut_by_columns_with_a_dot_or_fields(tmp_path, used):
    rows = [{"a.text": f"t{n}", "a": [{"b.c": n}], "ab": "x" * 1000} for n in range(ROWS)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=1)
    cuts = [*row_group_cuts([used])(tmp_path / "a.parquet")]
    assert len(cuts) == ROWS and all(0 < cut.size < 1000 for cut in cuts)


def test_a_column_with_a_dot_is_read_in_parts(tmp_path):
    rows = [{"a.text": f"t{n}"} for n in range(ROWS)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=4)
    source = DatasetConfig(path=str(tmp_path / "a.parquet"), text_column="a.text")
    cut = source.parts(1)
    assert len(cut) == 8
    found = [row for part in cut for row in source.read_part(part)]
    texts = [row.segments for row in found if isinstance(row, Document)]
    assert texts == [(f"t{n}",) for n in range(ROWS)]


def test_a_column_that_is_no_text_is_refused_when_parquet_is_cut(tmp_path):
    source = parquet(tmp_path).model_copy(update={"text_column": "other"})
    with pytest.raises(UserError, match="'other' holds int64 values, not text"):
        source.parts(1)
