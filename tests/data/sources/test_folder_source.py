"""Images with a text file beside each."""

import os

import pytest
from PIL import Image

from moma.data.documents import Document, ImageRef, Rejected
from moma.data.sources.folder import FolderConfig
from moma.errors import UserError


def source_of(**settings):
    return FolderConfig(**settings)


def write(folder, names, text="Red.\nde.utf8=Rot."):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text(text, encoding="utf-8")
        else:
            Image.new("RGB", (3, 2), "red").save(path)


def test_an_image_and_the_text_of_its_name_are_a_document(tmp_path):
    write(tmp_path, ["b.jpg", "b.txt", "sub/a.png", "sub/a.txt", ".git/c.png"])
    documents = list(source_of(path=tmp_path, caption_first=1).documents())
    assert [document.name for document in documents] == ["b", "sub/a"]
    caption, image = documents[1].segments
    assert caption == "Red."
    assert image.read().getpixel((0, 0)) == (255, 0, 0)
    whole = next(source_of(path=tmp_path, caption_first=0, caption="whole").documents())
    assert whole.segments[1] == "Red.\nde.utf8=Rot."


def test_png_is_preferred_to_other_formats_of_the_same_name(tmp_path):
    write(tmp_path, ["a.gif", "a.png", "a.txt", "a.jpg"])
    (document,) = source_of(path=tmp_path).documents()
    (image,) = (part for part in document.segments if isinstance(part, ImageRef))
    assert image.name.endswith("a.png)")


def test_images_and_texts_without_the_other_are_rejected_or_left_out(tmp_path):
    write(tmp_path, ["a.png", "a.txt", "single.png", "text.txt"])
    kinds = [type(row) for row in source_of(path=tmp_path).documents()]
    assert kinds == [Document, Rejected, Rejected]
    _, image, text = source_of(path=tmp_path).documents()
    assert "there is no single.txt beside it" in image.reason
    assert "there is no image beside it" in text.reason
    rows = list(source_of(path=tmp_path, without_text="leave_out").documents())
    assert [getattr(row, "row", "") for row in rows] == [
        str(tmp_path / "a.txt"),
        str(tmp_path / "text.txt"),
    ]


@pytest.mark.parametrize("data", [b"\n\n", b"\xff\xfe"])
def test_an_empty_or_undecodable_caption_is_rejected(tmp_path, data):
    write(tmp_path, ["a.png"])
    (tmp_path / "a.txt").write_bytes(data)
    (row,) = source_of(path=tmp_path).documents()
    assert isinstance(row, Rejected) and row.row == str(tmp_path / "a.txt")


def test_links_do_not_lead_out_of_the_folder(tmp_path):
    write(tmp_path, ["secret.png", "data/a.txt", "data/b.png"])
    (tmp_path / "data/a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data/b.txt").symlink_to(tmp_path / "secret.png")
    rows = list(source_of(path=tmp_path / "data").documents())
    assert len(rows) == 2 and all("is outside" in row.reason for row in rows)


def test_a_file_name_that_is_not_unicode_is_rejected(tmp_path):
    write(tmp_path, ["a.png", "a.txt"])
    for ending in (b".png", b".txt"):
        os.rename(tmp_path / f"a{ending.decode()}", os.fsencode(tmp_path) + b"/\xff" + ending)
    (row,) = source_of(path=tmp_path).documents()
    assert isinstance(row, Rejected) and "of its name is not valid Unicode" in row.reason


def test_the_fingerprint_covers_images_and_texts(tmp_path):
    write(tmp_path, ["a.png", "a.txt"])
    source = source_of(path=tmp_path)
    fingerprints = {source.fingerprint()}
    for name in ("a.png", "a.txt"):
        os.utime(tmp_path / name, ns=(1, 1))
        fingerprints.add(source.fingerprint())
    write(tmp_path, ["b.png"])
    fingerprints.add(source.fingerprint())
    (tmp_path / "unrelated.ogg").write_bytes(b"x")
    assert source.fingerprint() in fingerprints and len(fingerprints) == 4


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: .*check the source's 'path'"):
        list(source_of(path=tmp_path / "nowhere").documents())


def test_two_texts_of_one_name_are_rejected(tmp_path):
    write(tmp_path, ["a.png", "a.txt"])
    (tmp_path / "a.TXT").write_text("another")
    (row,) = source_of(path=tmp_path).documents()
    assert isinstance(row, Rejected) and "two texts of this name" in row.reason


def test_only_the_suffix_is_not_part_of_a_name(tmp_path):
    write(tmp_path, ["clip.1.png", "clip.1.txt", "clip.2.png", "clip.2.txt"])
    assert [d.name for d in source_of(path=tmp_path).documents()] == ["clip.1", "clip.2"]
