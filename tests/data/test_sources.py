"""Readers: what they yield, and what they say about rows that cannot be used."""

import json

import pytest
from PIL import Image

from moma.data.documents import Picture
from moma.data.sources import CaptionsConfig, TextConfig
from moma.errors import UserError


def captions_in(folder, rows, **settings):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return CaptionsConfig(path=folder, **settings)


def pictures_of(source):
    return [
        part for doc in source.documents() for part in doc.segments if isinstance(part, Picture)
    ]


def test_captions_become_documents_with_their_picture(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": f"red {number}", "licence": "x"} for number in range(400)]
    documents = list(captions_in(tmp_path, rows).documents())
    assert [doc.name for doc in documents] == ["a.png"] * 400
    first = [doc for doc in documents if isinstance(doc.segments[0], str)]
    assert 0.65 < len(first) / 400 < 0.85
    picture = next(part for part in documents[0].segments if isinstance(part, Picture))
    assert picture.read().size == (3, 2)
    assert "captions.jsonl, row 1" in picture.name


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_caption_first_is_a_share(tmp_path, share):
    source = captions_in(tmp_path, [{"image": "a", "caption": "b"}] * 20, caption_first=share)
    assert all(isinstance(doc.segments[0], str) == bool(share) for doc in source.documents())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "a.png",', r"captions\.jsonl, row 2: not valid JSON .*mend or remove"),
        ('["a.png"]', "row 2: write an object"),
        ({"image": "a.png"}, "row 2: needs a text under 'caption'; the keys there are: image"),
        ({"image": 3, "caption": "b"}, "row 2: needs a text under 'image'"),
        ({"image": "../a.png", "caption": "b"}, r"row 2: the image '\.\./a\.png' lies outside"),
        ({"image": "/etc/passwd", "caption": "b"}, "row 2: .* lies outside .*copy it into"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, message):
    source = captions_in(tmp_path, [{"image": "a.png", "caption": "a"}, row])
    with pytest.raises(UserError, match=message):
        list(source.documents())


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "secret.png")
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="lies outside"):
        list(captions_in(folder, [{"image": "a.png", "caption": "a"}]).documents())


def test_pictures_are_read_only_when_asked_for(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    names = ["none.png", "text.png", "cut.png"]
    pictures = pictures_of(
        captions_in(tmp_path, [{"image": name, "caption": "c"} for name in names])
    )
    messages = ["row 1: there is no .*none.png", "row 2: cannot read .*text", "row 3: cannot read"]
    for picture, message in zip(pictures, messages, strict=True):
        with pytest.raises(UserError, match=message):
            picture.read()


def test_a_picture_beyond_the_pixel_limit_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (picture,) = pictures_of(captions_in(tmp_path, [{"image": "a.png", "caption": "c"}]))
    with pytest.raises(UserError, match=r"row 1: .*too large .*shrink it"):
        picture.read()


def test_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    (picture,) = pictures_of(captions_in(tmp_path, [{"image": "a.jpg", "caption": "c"}]))
    assert picture.read().size == (2, 4)


def test_paragraphs_are_documents(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("\ufeff\nEins\nzwei\n \n\n\nDrei ä\n\nEins\nzwei".encode())
    documents = list(TextConfig(path=path).documents())
    assert [doc.segments for doc in documents] == [("Eins\nzwei",), ("Drei ä",), ("Eins\nzwei",)]
    assert documents[0].name == documents[2].name != documents[1].name


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"fine\n\xff\n")
    with pytest.raises(UserError, match=r"t\.txt, row 2: not UTF-8"):
        list(TextConfig(path=path).documents())


@pytest.mark.parametrize("kind", [TextConfig, CaptionsConfig])
def test_a_missing_file_is_named(tmp_path, kind):
    with pytest.raises(UserError, match=r"nowhere.*cannot read it"):
        list(kind(path=tmp_path / "nowhere").documents())
    with pytest.raises(UserError, match=r"nowhere.*cannot read it"):
        kind(path=tmp_path / "nowhere").stamp()
