"""What all readers share."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moma.data.documents import Document, ImageRef
from moma.data.sources.reading import cut, digest, inside, lines, matching
from moma.errors import UserError

IMAGES = [ImageRef(str(n), partial(Image.new, "L", (1, 1))) for n in range(12)]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.one_of(st.text(min_size=1), st.sampled_from(IMAGES)), min_size=1),
    st.integers(1, 4),
)
def test_a_cut_document_loses_nothing_and_has_no_piece_too_many(segments, most):
    pieces = list(cut(Document("d", tuple(segments), row="row 3"), most))
    assert [part for piece in pieces for part in piece.segments] == segments
    counts = [sum(isinstance(part, ImageRef) for part in piece.segments) for piece in pieces]
    assert all(count == most for count in counts[:-1]) and counts[-1] <= most
    assert [p.name for p in pieces] == ["d", *(f"d#{n}" for n in range(2, len(pieces) + 1))]
    assert {(piece.held_out_with, piece.row) for piece in pieces} == {("d", "row 3")}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text()), st.lists(st.text()))
def test_digests_tell_lists_of_texts_apart(first, second):
    assert (digest(*first) == digest(*second)) == (first == second)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")), max_size=9))
def test_lines_know_where_they_begin(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(data := b"\n".join(rows))
    found = list(lines(path))
    assert b"".join(line.bounded() for line in found) == data
    assert all(data[line.offset :].startswith(line.bounded()) for line in found)
    assert [line.number for line in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link/x", "a\0", "loop"])
def test_no_path_leads_out(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    assert inside(folder, "a/../b.png") == folder / "b.png"
    if name == "loop":  # newer versions of Python leave the circle as it is
        try:
            assert inside(folder, name) == folder / "loop"
        except UserError:
            return
    else:
        with pytest.raises(UserError, match=r"lies outside|is no path"):
            inside(folder, name)


def test_patterns_stand_for_sorted_files(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "0.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert matching(tmp_path / "**" / "*.txt") == [
        tmp_path / name for name in ("0.txt", "a/1.txt", "b/2.txt")
    ]
    assert matching(tmp_path / "none.txt") == [tmp_path / "none.txt"]
    (tmp_path / "a[1].txt").touch()
    assert matching(tmp_path / "a[1].txt") == [tmp_path / "a[1].txt"]
