"""WebDataset tar files: plain, compressed, damaged and hostile."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import tracemalloc

import pytest

from moma.data.documents import ImageRef, Rejected
from moma.data.sources.webdataset import WebDatasetConfig
from moma.errors import UserError
from tests.data.sources.rows import accepted, shape
from tests.factories import image_bytes, write_tar


def png(width=3):
    return image_bytes((width, 2))


def samples(*keys):
    return [
        member
        for width, key in enumerate(keys, start=1)
        for member in ((f"{key}.png", png(width)), (f"{key}.txt", f"caption of {key}".encode()))
    ]


def documents_of(path, **settings):
    return list(WebDatasetConfig(path=path, caption_first=0, **settings).documents())


def test_files_of_one_name_are_a_document(tmp_path):
    members = [
        ("./", (tarfile.DIRTYPE, "")),
        ("./a/1.5.JPG", png(4)),
        ("./a/1.txt", b"no image of its name"),
        ("a/2.jpg", png(5)),
        ("a/2.json", json.dumps({"caption": "from json", "url": "…"}).encode()),
        ("a/2.cls", b"7"),
        ("a/3.webp", png(6)),
        ("a/3.json", b"[]"),
        ("a/3.txt", "\ufeff text \n".encode()),
    ]
    *rejected, second, third = documents_of(write_tar(tmp_path / "a.tar", members))
    assert [row.row for row in rejected] == [f"{tmp_path}/a.tar, a/1.5", f"{tmp_path}/a.tar, a/1"]
    assert [row.reason.partition("the sample has: ")[2] for row in rejected] == ["jpg", "txt"]
    assert [d.name for d in (second, third)] == ["a/2", "a/3"]
    assert [d.segments[1] for d in (second, third)] == ["from json", "text"]
    assert [d.segments[0].read().width for d in (second, third)] == [5, 6]


@pytest.mark.parametrize("compression", ["", ":gz", ":bz2", ":xz"])
def test_plain_and_compressed_tars_are_read(tmp_path, compression):
    for name in "ab":
        members = samples(*(f"{name}{n}" for n in range(3)))
        write_tar(tmp_path / f"{name}.tar", members, f"w{compression}")
    documents = list(accepted(documents_of(tmp_path / "*.tar")))
    assert [document.name for document in documents] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    images = [document.segments[0] for document in pickle.loads(pickle.dumps(documents))]
    assert [image.read().width for image in reversed(images)] == [3, 2, 1, 3, 2, 1]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_in_several_compressed_streams_is_read(tmp_path, compress):
    data = write_tar(tmp_path / "plain.tar", samples(*map(str, range(60)))).read_bytes()
    starts = range(0, len(data), len(data) // 3)
    streams = [compress(data[start : start + len(data) // 3]) for start in starts]
    (tmp_path / "a.tar.gz").write_bytes(b"".join(streams))
    documents = accepted(documents_of(tmp_path / "a.tar.gz"))
    assert [shape(document)[0] for document in documents] == [*range(1, 61)]


def test_names_with_dots_are_separate_samples(tmp_path):
    frames = samples(*(f"clip.{n:04}" for n in range(300)))
    documents = list(accepted(documents_of(write_tar(tmp_path / "a.tar", frames))))
    assert [document.name for document in documents] == [f"clip.{n:04}" for n in range(300)]
    image, caption = documents[7].segments
    assert isinstance(image, ImageRef) and image.read().width == 8
    assert caption == "caption of clip.0007"


def test_every_bad_sample_is_counted(tmp_path):
    frames = [(f"clip.{n:04}.jpg", b"") for n in range(2300)]
    rows = documents_of(write_tar(tmp_path / "a.tar", [*samples("good"), *frames]))
    assert len(rows) == 2301 and sum(isinstance(row, Rejected) for row in rows) == 2300


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_other_files_of_a_complete_sample_are_ignored(tmp_path, mode):
    members = [
        ("1.depth.png", png(9)),
        ("1.jpg", png(4)),
        ("1.mask.png", png(9)),
        ("1.txt", b"main"),
        ("1.1.png", png(5)),
        ("1.1.txt", b"a pair of its own"),
        ("2.left.png", png()),
        ("2.txt", b"no image of its name"),
    ]
    pair, main, *rejected = documents_of(write_tar(tmp_path / "a.tar", members, mode))
    assert [pair.name, main.name] == ["1.1", "1"]
    assert [pair.segments[0].read().width, main.segments[0].read().width] == [5, 4]
    assert [row.row.rpartition(", ")[2] for row in rejected] == ["2.left", "2"]


def test_names_and_messages_are_bounded(tmp_path):
    members = [
        *samples("x" * 100_000),
        *(("a." + "y" * 50_000 + str(n), b"") for n in range(30)),
        *((f"b.{n}" + "z" * 9_000, b"") for n in range(30)),
    ]
    rows = documents_of(write_tar(tmp_path / "a.tar", members))
    assert len(rows) == 3 and max(len(row.row + row.reason) for row in rows) < 2000


def test_images_of_a_plain_tar_are_not_kept_in_memory(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(*map(str, range(20))))
    assert all(png(n + 1) not in pickle.dumps(d) for n, d in enumerate(documents_of(path)))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", png())], "needs an image (jpg, jpeg, png, webp) and a caption (txt, json)"),
        ([("a.txt", b"a")], "the sample has: txt"),
        ([("a.cls", b"a")], "the sample has: cls"),
        ([("a.png", png()), ("a.txt", b"\xff")], "not UTF-8"),
        ([("a.png", png()), ("a.txt", b" ")], "needs a text"),
        ([("a.png", png()), ("a.json", b"{")], "not valid JSON"),
        ([("a.png", png()), ("a.json", b'{"text": "a"}')], "needs a text under 'caption'"),
        ([*samples("a"), ("a.png", png(9))], "a.png is in the archive twice"),
        (samples("../../a"), "its path leads out of the archive"),
        (samples("/etc/a"), "its path leads out of the archive"),
        ([("a.png", (tarfile.SYMTYPE, "/etc/passwd")), ("a.txt", b"a")], "is a link"),
        ([("a.png", (tarfile.LNKTYPE, "good.png")), ("a.txt", b"a")], "is a link"),
        ([("a.png", png()), ("a.txt", (tarfile.CHRTYPE, ""))], "a.txt is a link"),
        ([("a.png", b"x" * 5001), ("a.txt", b"a")], "more than max_member_bytes = 5000"),
        ([("a.png", png()), ("a.txt", b"x" * 5001)], "more than max_member_bytes = 5000"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_bad_sample_is_rejected_and_the_others_are_read(tmp_path, members, reason, mode):
    path = write_tar(tmp_path / "a.tar", [*samples("good"), *members, *samples("last")], mode)
    first, rejected, last = documents_of(path, max_member_bytes=5000)
    assert [first.name, last.name] == ["good", "last"]
    assert isinstance(rejected, Rejected) and reason in rejected.reason
    assert last.segments[0].read().size == (1, 2)


def test_an_archive_bomb_is_rejected_without_filling_the_memory(tmp_path):
    size = 200 * 2**20
    path = tmp_path / "bomb.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        info = tarfile.TarInfo("bomb.png")
        info.size = size
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(info, zeros)
        text = tarfile.TarInfo("bomb.txt")
        text.size = 1
        archive.addfile(text, io.BytesIO(b"a"))
    assert path.stat().st_size < size / 100
    tracemalloc.start()
    (rejected,) = documents_of(path)
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()
    assert "more than max_member_bytes" in rejected.reason


def test_a_header_with_an_enormous_size_is_refused(tmp_path):
    info = tarfile.TarInfo("a")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    with pytest.raises(UserError, match=r"a\.tar: cannot read it \(a header of 1073741824 bytes"):
        documents_of(tmp_path / "a.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_truncated_tar_is_refused(tmp_path, mode):
    path = write_tar(tmp_path / "a.tar", samples(*map(str, range(50))), mode)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match=r"a\.tar: cannot read it .*download it again"):
        documents_of(path)


def test_a_tar_damaged_in_its_middle_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(*map(str, range(50))))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        start = archive.getmember("30.png").offset
    data[start : start + 512] = b"x" * 512
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged in its middle"):
        documents_of(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["3.png", "3.txt", "0.png"])
def test_zeros_in_the_place_of_a_header_are_refused(tmp_path, name, compress):
    path = write_tar(tmp_path / "a.tar", samples(*map(str, range(6))))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        start = archive.getmember(name).offset
    data[start : start + 512] = bytes(512)
    path.write_bytes(compress(bytes(data)))
    with pytest.raises(UserError, match=r"a\.tar: cannot read it .*download it again"):
        documents_of(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_archives_one_after_the_other_in_a_file_are_refused(tmp_path, compress):
    parts = [write_tar(tmp_path / f"{name}.tar", samples(name)).read_bytes() for name in "ab"]
    (tmp_path / "both").write_bytes(b"".join(map(compress, parts)))
    with pytest.raises(UserError, match=r"data follow its end.*several archives, which `tar --ig"):
        documents_of(tmp_path / "both")


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_tar_cut_between_two_files_is_refused(tmp_path, compress):
    path = write_tar(tmp_path / "a.tar", samples(*"abc"))
    with tarfile.open(path) as archive:
        start = archive.getmember("c.png").offset
    path.write_bytes(compress(path.read_bytes()[:start]))
    with pytest.raises(UserError, match=r"a\.tar: cannot read it \(it is cut off\)"):
        documents_of(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_a_tar_of_zeros_is_refused(tmp_path, compress):
    write_tar(tmp_path / "a.tar", samples(*"ab"))
    (tmp_path / "b.tar").write_bytes(compress(bytes(20480)))
    with pytest.raises(UserError, match=r"b\.tar: cannot read it \(it holds no files: delete it"):
        documents_of(tmp_path / "*.tar")


@pytest.mark.parametrize("padding", [512, 1024, 50_000])
def test_any_number_of_zeros_ends_a_tar(tmp_path, padding):
    path = write_tar(tmp_path / "a.tar", samples(*"ab"))
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content + bytes(-len(content) % 512 + padding))
    assert len(list(accepted(documents_of(path)))) == 2


@pytest.mark.parametrize("name", ["nowhere.tar", "no*.tar", "text.tar", "empty.tar"])
def test_a_file_that_is_not_a_tar_is_an_error(tmp_path, name):
    (tmp_path / "text.tar").write_text("no tar" * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(UserError, match=name.replace("*", r"\*")):
        documents_of(tmp_path / name)


def test_a_damaged_image_names_its_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", png()[:40]), ("a.txt", b"a")])
    (document,) = documents_of(path)
    assert isinstance(document.segments[0], ImageRef)
    with pytest.raises(UserError, match=r"a\.tar, a\.png: cannot read"):
        document.segments[0].read()
