"""What all readers of files share."""

import errno
import os
from functools import partial
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from moma.data.documents import Document, ImageRef, Rejected
from moma.data.sources.jsonl import decompress, parse_json_object, read_lines, require_text
from moma.data.sources.paths import (
    FileRange,
    expand_pattern,
    files_below,
    fingerprint_of,
    resolve_inside,
)
from moma.data.sources.reading import ReaderConfig, content_hash, split_document
from moma.errors import StorageError, UserError

IMAGES = [ImageRef(str(n), partial(Image.new, "L", (1, 1))) for n in range(12)]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.one_of(st.text(min_size=1), st.sampled_from(IMAGES)), min_size=1), st.integers(1, 4)
)
def test_a_split_document_loses_nothing_and_has_no_extra_piece(segments, max_images):
    pieces = list(split_document(Document("d", tuple(segments), row="row 3"), max_images))
    assert [part for piece in pieces for part in piece.segments] == segments
    counts = [sum(isinstance(part, ImageRef) for part in piece.segments) for piece in pieces]
    assert all(count == max_images for count in counts[:-1]) and counts[-1] <= max_images
    assert [p.name for p in pieces] == ["d", *(f"d#{n}" for n in range(2, len(pieces) + 1))]
    assert {(piece.held_out_with, piece.row) for piece in pieces} == {("d", "row 3")}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text()), st.lists(st.text()))
def test_content_hashes_differ_between_lists_of_texts(first, second):
    assert (content_hash(*first) == content_hash(*second)) == (first == second)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")), max_size=9))
def test_lines_have_numbers_and_offsets(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(data := b"\n".join(rows))
    with path.open("rb") as file:
        assume(decompress(file) is file)  # some first bytes mean a compressed file
    found = list(read_lines(FileRange(path)))
    assert b"".join(line.content() for line in found) == data
    assert all(data[line.offset :].startswith(line.content()) for line in found)
    assert [line.number for line in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link/x", "a\0", "loop"])
def test_paths_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    assert resolve_inside(folder, "a/../b.png") == folder / "b.png"
    if name == "loop":  # newer versions of Python leave the circle as it is
        try:
            assert resolve_inside(folder, name) == folder / "loop"
        except UserError:
            return
    else:
        with pytest.raises(UserError, match=r"is outside|is not a path"):
            resolve_inside(folder, name)


def test_patterns_match_sorted_files(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "0.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert expand_pattern(tmp_path / "**" / "*.txt") == [
        tmp_path / name for name in ("0.txt", "a/1.txt", "b/2.txt")
    ]
    assert expand_pattern(tmp_path / "none.txt") == [tmp_path / "none.txt"]
    (tmp_path / "a[1].txt").touch()
    assert expand_pattern(tmp_path / "a[1].txt") == [tmp_path / "a[1].txt"]


def test_a_name_that_exists_is_not_taken_as_a_pattern(tmp_path):
    for folder in ("run[12]", "run1", "sub/run[12]", "sub/run1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").touch()
    found = [
        expand_pattern(tmp_path / pattern)
        for pattern in ("run[12]/a.txt", "run[12]/*.txt", "*/run[12]/*", "run?/*")
    ]
    assert [[str(path.relative_to(tmp_path)) for path in files] for files in found] == [
        ["run[12]/a.txt"],
        ["run[12]/a.txt"],
        ["sub/run[12]/a.txt"],
        ["run1/a.txt"],
    ]


def test_cycles_of_links_end_and_hidden_files_are_not_matched(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("1.txt", ".2.txt"):
        (tmp_path / "a" / name).touch()
    for n in range(5):
        (tmp_path / "a" / f"loop{n}").symlink_to(tmp_path)
    assert expand_pattern(tmp_path / "**" / "*.txt") == [tmp_path / "a" / "1.txt"]
    assert expand_pattern(tmp_path / "**") == [tmp_path / "a" / "1.txt"]
    assert expand_pattern(tmp_path / "a" / ".*.txt") == [tmp_path / "a" / ".2.txt"]


@pytest.mark.parametrize("find", [files_below, lambda folder: expand_pattern(folder / "**" / "*")])
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, find):
    (tmp_path / "private").mkdir()
    (tmp_path / "a.txt").touch()

    def refuse(function, path=".", *more):
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *more)

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, partial(refuse, getattr(os, name)))
    with pytest.raises(UserError, match=r"private: cannot read it \(Permission denied\)"):
        find(tmp_path)


def test_base64_without_its_prefix_is_explained_in_a_short_message(tmp_path):
    for name in ("iVBORw0KGgo/" * 30, "iVBORw0KGgo/" * 30_000, "x" * 5000):
        with pytest.raises(UserError, match="write data:image/png;base64, before it") as caught:
            resolve_inside(tmp_path, name)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": "a", "text": "b"}', "has the key 'text' more than once"),
        (b'{"text": "a", "n": NaN, "other": {"k": 1, "k": 2}, "big": ' + b"9" * 5000 + b"}", None),
        (b'\xef\xbb\xbf{"text": "a"}', None),
        (b'{"te\xfft": "a"}', "not UTF-8"),
        (b'{"text": ["a"]}', "not a list"),
        (b"{" + b", ".join(b'"%d": 0' % n for n in range(9999)) + b"}", "more)"),
        (b'{"%s": 0}' % (b"k" * 99_999), "needs a text under 'text'"),
    ],
)
def test_json_rows_with_odd_values(row, reason):
    if reason is None:
        assert require_text(parse_json_object(row), "text") == "a"
        return
    with pytest.raises(UserError) as caught:
        require_text(parse_json_object(row), "text")
    assert reason in str(caught.value) and len(str(caught.value)) < 1500


class Failing(ReaderConfig):
    """A source of one row that raises an error."""

    name: str = "failing"
    error: type[UserError] = UserError

    def read_rows(self, part):
        yield "y" * 1_000_000, self.fail

    def fail(self):
        raise self.error("x" * 1_000_000)


def test_a_source_that_reads_nothing_says_so():
    with pytest.raises(NotImplementedError):
        list(ReaderConfig(name="nothing").documents())
    assert len([*Failing().read_part(*Failing().parts(1))]) == 1


def test_rejected_reasons_are_bounded():
    (rejected,) = Failing().documents()
    assert isinstance(rejected, Rejected)
    assert len(rejected.reason) <= 1000 and len(rejected.row) <= 300


def test_an_error_of_the_disk_is_not_a_rejected_row():
    with pytest.raises(StorageError):
        list(Failing(error=StorageError).documents())


def test_a_failing_disk_is_not_a_changed_image(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(StorageError, match=r"a\.png.*check the disk"):
        fingerprint_of([], optional=[tmp_path / "a.png"])
