"""Image folders with a list of captions."""

import json
import os
import pickle

import pytest
from PIL import Image

from moma.data.documents import ImageRef, Rejected, held_out_share, is_held_out
from moma.data.sources.captions import CaptionsConfig
from moma.errors import UserError
from tests.data.sources.rows import accepted
from tests.factories import image_bytes


def captions_in(folder, rows, **settings):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return CaptionsConfig(path=folder, **settings)


def images_of(documents):
    return [
        part
        for document in accepted(documents)
        for part in document.segments
        if isinstance(part, ImageRef)
    ]


def test_captions_become_documents_with_their_image(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": f"red {number}", "license": "x"} for number in range(400)]
    documents = list(accepted(captions_in(tmp_path, rows).documents()))
    assert [doc.name for doc in documents] == ["a.png"] * 400
    first = [doc for doc in documents if isinstance(doc.segments[0], str)]
    assert 0.65 < len(first) / 400 < 0.85
    image = next(part for part in documents[0].segments if isinstance(part, ImageRef))
    assert image.read().size == (3, 2)
    assert "captions.jsonl, row 1" in image.name


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_caption_first_is_a_share(tmp_path, share):
    rows = [{"image": str(number), "caption": "b"} for number in range(50)]
    source = captions_in(tmp_path, rows, caption_first=share)
    assert all(
        isinstance(doc.segments[0], str) == bool(share) for doc in accepted(source.documents())
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            '{"image": "a.png",',
            r"^not valid JSON \(Expecting [^:]*: character \d+\); fix or remove",
        ),
        ("[" * 200_000, "^not valid JSON"),
        ('["a.png"]', "^not a JSON object; write one"),
        ({"image": "a.png"}, "^needs a text under 'caption' or 'text'; the keys are: image"),
        ({"image": 3, "caption": "b"}, "^needs a text under 'image'"),
        ({"image": "a.png", "caption": "\ud800"}, "^the text under 'caption' is not valid"),
        ({"image": "a\0.png", "caption": "b"}, r"^the image 'a\\x00.png' is not a path"),
        ({"image": "../a.png", "caption": "b"}, r"^the image '\.\./a\.png' is outside"),
        ({"image": "/etc/passwd", "caption": "b"}, "is outside .*copy it into"),
        ({"image": "https://a.example/a.png", "caption": "b"}, "is a web address; download it"),
        ({"image": "s3://a/a.png", "caption": "b"}, "is a web address; download it"),
        ({"image": "HTTP://a.example/a.png", "caption": "b"}, "is a web address; download it"),
    ],
)
def test_a_bad_row_is_rejected_and_the_others_are_read(tmp_path, row, reason):
    good = {"image": "a.png", "caption": "a"}
    first, rejected, last = captions_in(tmp_path, [good, row, good]).documents()
    assert first.name == last.name == "a.png"
    assert isinstance(rejected, Rejected)
    assert rejected.row == f"{tmp_path / 'captions.jsonl'}, row 2"
    with pytest.raises(UserError, match=reason):
        raise UserError(rejected.reason)


def test_a_link_out_of_the_folder_is_rejected(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (1, 1)).save(tmp_path / "secret.png")
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    (row,) = captions_in(folder, [{"image": "a.png", "caption": "a"}]).documents()
    assert isinstance(row, Rejected) and "is outside" in row.reason


def test_images_are_read_on_demand_and_errors_name_their_row(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    names = ["none.png", "text.png", "cut.png", "whole.png"]
    source = captions_in(
        tmp_path, [{"image": n, "caption": "c"} for n in names], max_pixels=64 * 64 - 1
    )
    messages = ["row 1: there is no .*none.png", "row 2: cannot read .*text", "row 3: ", "row 4: "]
    for image, message in zip(images_of(source.documents()), messages, strict=True):
        with pytest.raises(UserError, match=message):
            image.read()


def test_an_image_can_be_read_in_another_process(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    (image,) = images_of(captions_in(tmp_path, [{"image": "a.png", "caption": "c"}]).documents())
    assert pickle.loads(pickle.dumps(image)).read().size == (3, 2)


def test_the_fingerprint_covers_the_list_and_its_images(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    source = captions_in(tmp_path, [{"image": "a.png", "caption": "c"}, "no JSON"])
    fingerprints = [source.fingerprint()]
    assert source.fingerprint() == fingerprints[0]
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    fingerprints.append(source.fingerprint())
    os.utime(tmp_path / "a.png", ns=(1, 1))
    fingerprints.append(source.fingerprint())
    (tmp_path / "a.png").unlink()
    fingerprints.append(source.fingerprint())
    captions_in(tmp_path, [{"image": "a.png", "caption": "another"}])
    fingerprints.append(source.fingerprint())
    assert len(set(fingerprints)) == 5


def test_the_held_out_split_is_stable_under_reordering_and_growth(tmp_path):
    rows = [{"image": f"{number}.png", "caption": "c"} for number in range(400)]

    def in_training(rows, **settings):
        source = captions_in(tmp_path, rows, **settings)
        share = held_out_share(source, 0.1)
        return {
            document.name
            for document in accepted(source.documents())
            if not is_held_out(document, share)
        }

    half = in_training(rows, held_out=0.5)
    assert 160 < len(half) < 240 < 340 < len(in_training(rows)) < 380
    assert in_training(rows[::-1], held_out=0.5) == half
    more = [{"image": f"new{number}.png", "caption": "c"} for number in range(100)]
    grown = in_training(more + rows, held_out=0.5)
    assert {name for name in grown if not name.startswith("new")} == half


def test_a_missing_list_is_an_error(tmp_path):
    source = CaptionsConfig(path=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere.*cannot read it"):
        list(source.documents())
    with pytest.raises(UserError, match=r"nowhere.*cannot read it"):
        source.fingerprint()


def test_a_file_as_path_is_named(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "c"}\n')
    source = CaptionsConfig(path=tmp_path / "captions.jsonl")
    with pytest.raises(UserError, match=rf"^{tmp_path}/captions\.jsonl: .*Not a directory"):
        list(source.documents())


def test_different_spellings_of_a_path_give_one_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        Image.new("RGB", (3, 2)).save(tmp_path / name)
    (tmp_path / "link.png").symlink_to("a.png")
    spelled = ["a.png", "./a.png", "sub/../a.png", "link.png", "sub/b.png", "sub//b.png"]
    rows = [{"image": name, "caption": "c"} for name in spelled]
    documents = list(accepted(captions_in(tmp_path, rows).documents()))
    assert [one.name for one in documents] == ["a.png"] * 4 + ["sub/b.png"] * 2
    assert len({isinstance(one.segments[0], str) for one in documents[:4]}) == 1


def test_image_folders_of_the_library_datasets_are_read(tmp_path):
    for folder in ("", "sub"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (3, 2)).save(tmp_path / folder / "a.png")
    top = {"file_name": "a.png", "text": "top", "image": "b.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(top))
    below = [{"file_name": "a.png", "caption": "below"}, {"file_name": "../a.png", "text": "out"}]
    (tmp_path / "sub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, below)))
    source = CaptionsConfig(path=tmp_path, caption_first=1)
    *rows, outside = source.documents()
    documents = list(accepted(rows))
    assert [(d.name, d.segments[0]) for d in documents] == [
        ("a.png", "top"),
        ("sub/a.png", "below"),
    ]
    assert isinstance(outside, Rejected) and "is outside" in outside.reason
    assert [image.read().size for image in images_of(documents)] == [(3, 2)] * 2
    before = source.fingerprint()
    os.utime(tmp_path / "sub" / "a.png", ns=(1, 1))
    assert source.fingerprint() != before
    # A captions.jsonl is the list where there is one.
    captions_in(tmp_path, [{"image": "sub/a.png", "caption": "listed"}])
    assert [d.name for d in accepted(source.documents())] == ["sub/a.png"]


def test_metadata_csv_is_read_as_it_is_written(tmp_path):
    for name in ("1.png", "2.png", "NA"):
        (tmp_path / name).write_bytes(image_bytes())
    rows = ["file_name,text,id", "1.png,007,1,", "2.png,NA,2", "NA,2020-01-01,3", "1.png,a,1,x"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    source = CaptionsConfig(path=tmp_path, caption_first=1)
    *documents, rejected = source.documents()
    assert [(d.name, d.segments[0]) for d in accepted(documents)] == [
        ("1.png", "007"),
        ("2.png", "NA"),
        ("NA", "2020-01-01"),
    ]
    assert isinstance(rejected, Rejected) and "4 fields" in rejected.reason
    assert rejected.row == f"{tmp_path}/metadata.csv, line 5"
    before = source.fingerprint()
    os.utime(tmp_path / "2.png", ns=(1, 1))
    assert source.fingerprint() != before


def test_columns_of_metadata_csv_are_checked(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text,text\na,b,c\n")
    (rejected,) = CaptionsConfig(path=tmp_path).documents()
    assert isinstance(rejected, Rejected) and "'text' more than once" in rejected.reason
    (tmp_path / "metadata.csv").write_text("name,text\na,b\n")
    with pytest.raises(UserError, match="has no column 'file_name'"):
        list(CaptionsConfig(path=tmp_path).documents())
