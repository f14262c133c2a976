"""Icons: what is read of a package of icon sets, how it is drawn, captioned and held out."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from moma.data.documents import Document, ImageRef, Rejected, which_held_out
from moma.demo.icons import IconsConfig
from moma.errors import UserError
from tests.factories import write_icons

WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)
SQUARE = '<rect width="16" height="16" fill="red"/>'
# Red above blue, the left of it only: no two of its turns and reflections are equal.
CORNER = '<rect width="8" height="4" fill="red"/><rect y="4" width="4" height="4" fill="blue"/>'


def image_of(row) -> Image.Image:
    assert isinstance(row, Document)
    (image,) = (part for part in row.segments if isinstance(part, ImageRef))
    return image.read()


def names(rows) -> list[str]:
    return [row.name for row in rows]


def read(folder, icons, **values):
    """The rows of one set, drawn with 32 × 32 pixels."""
    write_icons(folder, {"fruit": icons}, **values)
    return list(IconsConfig(path=folder, image_size=32, caption_first=1).documents())


def test_an_icon_is_drawn_on_white_with_its_name_and_its_set_s_as_caption(tmp_path):
    circle = '<circle cx="8" cy="8" r="8" fill="red"/>'
    (row,) = read(tmp_path, {"red-apple": circle})
    assert row.name == "fruit:red-apple"
    assert row.segments[0] == "red apple, Fruit Icons"
    assert row.row == f"{tmp_path}/json/fruit.json, red-apple"
    image = image_of(row)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert [image.getpixel(at) for at in ((0, 0), (16, 16))] == [WHITE, RED]


def test_the_color_of_the_text_around_an_icon_is_black(tmp_path):
    (row,) = read(tmp_path, {"a": SQUARE.replace("red", "currentColor")})
    assert image_of(row).getpixel((16, 16)) == BLACK


def test_the_view_box_is_the_icon_s_else_the_set_s_and_is_centered(tmp_path):
    icons = {"own": {"body": SQUARE, "left": -16, "width": 32, "height": 32}, "set": SQUARE}
    own, of_set = read(tmp_path, icons, width=32, height=16)
    # From -16 to 16, and from 0 to 32: the square is the upper right and the upper left quarter.
    pixels = np.asarray(image_of(own))
    assert (pixels[:16, 16:] == RED).all() and (pixels[:, :16] == WHITE).all()
    # 32 × 16: as wide as the image, half as high, in its middle.
    pixels = np.asarray(image_of(of_set))
    assert (pixels[8:24, :16] == RED).all()
    assert (pixels[:8] == WHITE).all() and (pixels[24:] == WHITE).all()
    (row,) = read(tmp_path, {"default": SQUARE})
    assert (np.asarray(image_of(row)) == RED).all()


@pytest.mark.parametrize("rotate", [0, 1, 2, 3, 4 * 10**307 + 1])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
def test_turned_and_flipped_icons_are_those_of_svg(tmp_path, rotate, mirrored, flipped):
    """Flipped, then turned clockwise."""
    flips = f"translate({8 * mirrored} {8 * flipped}) scale({1 - 2 * mirrored} {1 - 2 * flipped})"
    transformed = f'<g transform="rotate({90 * (rotate % 4)} 4 4) {flips}">{CORNER}</g>'
    keys = {"rotate": rotate, "hFlip": mirrored, "vFlip": flipped}
    icons = {"a": {"body": CORNER, **keys}, "b": transformed}
    turned, reference = map(image_of, read(tmp_path, icons, width=8, height=8))
    assert turned.tobytes() == reference.tobytes()


def test_hidden_icons_and_aliases_are_left_out(tmp_path):
    icons = {"old": {"body": SQUARE, "hidden": True}, "new": SQUARE}
    rows = read(tmp_path, icons, aliases={"other": {"parent": "new"}})
    assert names(rows) == ["fruit:new"]


def test_coloured_sets_are_read_or_those_that_are_named(tmp_path):
    write_icons(tmp_path, {name: {"a": SQUARE} for name in ("c", "gray", "b")}, ["gray"])
    for sets, prefixes in ((None, ["b:a", "c:a"]), (["gray", "b"], ["b:a", "gray:a"])):
        source = IconsConfig.model_validate({"path": tmp_path, "sets": sets})
        assert names(source.documents()) == prefixes


def test_equal_drawings_are_held_out_together_whatever_their_names(tmp_path):
    bodies = [f'<rect width="{width}" height="16"/>' for width in range(1, 200)]
    sets = {
        prefix: {f"{prefix}-{index}": body for index, body in enumerate(bodies)}
        for prefix in ("a", "b")
    }
    rows = IconsConfig(path=write_icons(tmp_path, sets)).documents()
    documents = [row for row in rows if isinstance(row, Document)]
    held_out = which_held_out(documents, 0.2)
    assert len(set(names(documents))) == 2 * len(bodies)
    assert np.array_equal(held_out[: len(bodies)], held_out[len(bodies) :])
    assert 0.1 < held_out.mean() < 0.3


def test_parts_are_whole_sets_and_together_the_source(tmp_path):
    sets = ("a", "b", "c")
    write_icons(tmp_path, {name: {str(n): SQUARE for n in range(8)} for name in sets})
    source = IconsConfig(path=tmp_path)
    (whole,) = source.parts(2**30)
    parts = source.parts(2**20)  # as much as eight images count
    assert [part.file for part in parts] == [f"{tmp_path}/json/{name}.json" for name in sets]
    rows = [name for part in parts for name in names(source.read_part(part))]
    assert rows == names(source.read_part(whole)) == names(source.documents())
    assert len(rows) == 24


REFUSED = {
    "is_list": ([], "not an object"),
    "no_body": ({"width": 16}, "needs a text under 'body'"),
    "width": ({"body": SQUARE, "width": "16"}, "'width' is not a number"),
    "infinite": ({"body": SQUARE, "left": float("inf")}, "'left' is not a number"),
    "huge": ({"body": SQUARE, "width": 10**400}, "'width' is not a number"),
    "huge_turn": ({"body": SQUARE, "rotate": -(10**400)}, "'rotate' is not a number"),
    "height": ({"body": SQUARE, "height": 0}, "'height' is not a positive number"),
    "half\ud800": (SQUARE, "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_icon_that_cannot_be_used_is_rejected_with_its_name(tmp_path, name):
    icon, reason = REFUSED[name]
    rejected, other = read(tmp_path, {name: icon, "other": SQUARE})
    assert isinstance(rejected, Rejected)
    assert rejected.row == f"{tmp_path}/json/fruit.json, {name}"
    assert reason in rejected.reason
    assert other.name == "fruit:other"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<rect", "not XML"),
        (f'{SQUARE}</svg><svg width="9" height="9">', "not XML"),
        ('<image href="{}/a.png" width="16" height="16"/>', "refers to other files"),
        ('<image xlink:href="a.png" width="16" height="16"/>', "refers to other files"),
    ],
)
def test_an_icon_that_cannot_be_drawn_is_refused_when_it_is_read(tmp_path, body, reason):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    (row,) = read(tmp_path, {"a": body.format(tmp_path)})
    with pytest.raises(UserError, match=r"fruit.json, a: cannot draw it .*" + reason):
        image_of(row)


def test_an_image_has_its_size_whatever_the_icon_says(tmp_path):
    icon = {"body": SQUARE, "width": 1e9, "height": 1}
    inner = f'<svg width="1e9" height="1e9">{SQUARE}</svg>'
    for row in read(tmp_path, {"long": icon, "inner": inner}):
        assert image_of(row).size == (32, 32)


def test_a_package_that_cannot_be_read_is_refused(tmp_path):
    def refuses(message, **values):
        with pytest.raises(UserError, match=message):
            list(IconsConfig.model_validate({"path": tmp_path, **values}).documents())

    refuses("collections.json: cannot read it .*unpack the npm package @iconify/json")
    write_icons(tmp_path, {"fruit": {"a": SQUARE}}, ["fruit"])
    refuses("collections.json: has no coloured sets; choose some with 'sets'")
    refuses("collections.json: has no set other, unknown;", sets=["unknown", "fruit", "other"])
    file = tmp_path / "json" / "fruit.json"
    for content, message in (("{", "cannot read it"), ("[]", "not a JSON object"), ("{}", "icons")):
        file.write_text(content)
        refuses(f"fruit.json: .*{message}.*unpack the npm package", sets=["fruit"])
    file.unlink()
    refuses("fruit.json: cannot read it", sets=["fruit"])
    for collections in ('{"../../fruit": {"palette": true}}', '{"fruit": []}'):
        (tmp_path / "collections.json").write_text(collections)
        refuses("fruit' is not a set")
    for total in ("1" + "0" * 400, "-1", "null"):
        values = f'{{"fruit": {{"palette": true, "total": {total}}}}}'
        (tmp_path / "collections.json").write_text(values)
        refuses("collections.json: 'total' of fruit is not a number of icons")


def test_a_missing_package_that_draws_is_named_before_any_icon_is_read(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "resvg_py" else find(name)
    )
    with pytest.raises(UserError, match=r"resvg-py.*pip install 'moma\[demo\]'"):
        read(tmp_path, {"a": SQUARE})


def test_the_fingerprint_changes_with_the_files_of_the_sets_that_are_read(tmp_path):
    sets = {"fruit": {"a": SQUARE}, "other": {"a": SQUARE}}
    source = IconsConfig.model_validate({"path": write_icons(tmp_path, sets), "sets": ["fruit"]})
    before = source.fingerprint()
    (tmp_path / "json" / "other.json").write_text("{}")
    assert source.fingerprint() == before
    (tmp_path / "json" / "fruit.json").write_text("{}")
    assert source.fingerprint() != before
