"""Interleaved JSON Lines, in both layouts."""

import base64
import io
import json
import pickle

import pytest
from PIL import Image

from moma.data.documents import ImageRef, Rejected
from moma.data.sources import interleaved
from moma.data.sources.interleaved import InterleavedConfig
from moma.data.sources.jsonl import parse_json_object
from moma.errors import UserError


def source_of(folder, *rows, **settings):
    Image.new("RGB", (3, 2), "red").save(folder / "a.png")
    (folder / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return InterleavedConfig(path=folder / "pages.jsonl", **settings)


def shape(document):
    return [part if isinstance(part, str) else part.read().size for part in document.segments]


def data_url(width):
    file = io.BytesIO()
    Image.new("RGB", (width, 5)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_both_layouts_give_the_same_document(tmp_path):
    segments = [
        {"type": "text", "text": "before"},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": " \n"},
        {"type": "text", "text": "after"},
    ]
    lists = {
        "texts": ["before", None, None, "after"],
        "images": [None, "a.png", None, None],
        "metadata": "…",
    }
    first, second = source_of(tmp_path, {"segments": segments}, lists).documents()
    assert shape(first) == shape(second) == ["before", (3, 2), "after"]
    assert first.name == second.name
    assert second.row.endswith("pages.jsonl, row 2")


def test_names_come_from_the_content(tmp_path):
    rows = [{"texts": [f"t{n}", None], "images": [None, "a.png"]} for n in range(4)]
    names = [row.name for row in source_of(tmp_path, *rows).documents()]
    assert len(set(names)) == 4
    assert [row.name for row in source_of(tmp_path, *rows[::-1]).documents()] == names[::-1]


def test_images_in_a_row_are_read_on_demand(tmp_path):
    rows = [
        {"texts": ["ä", None, None, None], "images": [None, data_url(w), "a.png", d]}
        for w, d in ((7, data_url(9)), (8, "data:image/png;base64,!!"))
    ]
    first, second = source_of(tmp_path, *rows).documents()
    assert base64.b64decode(data_url(7)[22:]) not in pickle.dumps(first)
    assert data_url(7)[22:].encode() not in pickle.dumps(first)
    assert shape(pickle.loads(pickle.dumps(first))) == ["ä", (7, 5), (3, 2), (9, 5)]
    *fine, broken = second.segments[1:]
    assert [image.read().width for image in fine] == [8, 3]
    with pytest.raises(UserError, match=r"row 2, image 3: cannot read it .*fix or remove"):
        broken.read()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "needs 'segments', or 'texts' and 'images'; the keys are: text"),
        ({"segments": "a"}, "'segments' must be a list"),
        ({"segments": []}, "contains neither text nor an image"),
        ({"segments": [{"type": "sound"}]}, "a segment is"),
        ({"segments": [{"type": "text"}]}, "a segment is"),
        ({"segments": [{"type": "image", "image": "../b.png"}]}, "is outside"),
        ({"segments": [{"type": "image", "image": 3}]}, "image 1 is not a text"),
        ({"segments": [{"type": "image", "image": "http://a.example/b"}]}, "is a web address"),
        ({"texts": ["a"]}, "'images' must be a list"),
        ({"texts": ["a"], "images": []}, "'texts' has 1 entries and 'images' 0"),
        ({"texts": ["a"], "images": ["b"]}, "entry 1 has a text and an image"),
        ({"texts": [4], "images": [None]}, "entry 1 of 'texts' is not a text"),
        ({"texts": ["\ud800"], "images": [None]}, "is not valid Unicode"),
    ],
)
def test_a_bad_row_is_rejected(tmp_path, row, reason):
    good = {"segments": [{"type": "text", "text": "good"}]}
    first, rejected, last = source_of(tmp_path, good, row, good).documents()
    assert first.segments == last.segments == ("good",)
    assert isinstance(rejected, Rejected)
    assert reason in rejected.reason and rejected.row.endswith("pages.jsonl, row 2")


def test_a_document_with_more_than_max_images_is_split(tmp_path):
    row = {
        "texts": ["t0", None, "t1", None, None, "t2"],
        "images": [None, "a.png", None, "a.png", "a.png", None],
    }
    (whole,) = source_of(tmp_path, row).documents()
    pieces = list(source_of(tmp_path, row, max_images=2).documents())
    assert [shape(piece) for piece in pieces] == [["t0", (3, 2), "t1", (3, 2)], [(3, 2), "t2"]]
    assert [piece.name for piece in pieces] == [whole.name, f"{whole.name}#2"]
    assert {piece.held_out_with for piece in pieces} == {whole.name}


def test_the_fingerprint_covers_the_images(tmp_path):
    source = source_of(tmp_path, {"texts": [None], "images": ["a.png"]}, {"no": "document"})
    before = source.fingerprint()
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    assert source.fingerprint() != before


def test_a_document_may_be_one_image(tmp_path):
    (document,) = source_of(tmp_path, {"texts": [None], "images": ["a.png"]}).documents()
    (image,) = document.segments
    assert isinstance(image, ImageRef)


def test_a_row_is_parsed_once_for_all_its_images(tmp_path, monkeypatch):
    row = {"texts": [None] * 50, "images": [data_url(n + 1) for n in range(50)]}
    (document,) = source_of(tmp_path, row).documents()
    parsed = []

    def parse(data):
        parsed.append(len(data))
        return parse_json_object(data)

    monkeypatch.setattr(interleaved, "parse_json_object", parse)
    assert [image.read().width for image in document.segments] == list(range(1, 51))
    assert len(parsed) == 1
    # A file that has changed is read again.
    source_of(tmp_path, {"texts": [None], "images": [data_url(99)]})
    assert document.segments[0].read().width == 99


@pytest.mark.parametrize(
    "change", [lambda url: "DATA" + url[4:], lambda url: url[:40] + "\n " + url[40:]]
)
def test_data_urls_are_read_as_browsers_read_them(tmp_path, change):
    row = {"texts": [None], "images": [change(data_url(7))]}
    (document,) = source_of(tmp_path, row).documents()
    assert document.segments[0].read().width == 7
