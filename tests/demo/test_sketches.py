"""Sketches: what is drawn, captioned and held out."""

import importlib.util
from itertools import product

import numpy as np
import pytest
from PIL import Image

from moma.data.documents import Document, ImageRef
from moma.demo.drawings import STYLES, render
from moma.demo.sketches import (
    Sketch,
    SketchesConfig,
    is_held_out_pair,
    is_held_out_style,
    object_names,
    short_definitions,
    with_article,
)
from moma.errors import UserError
from moma.images import on_white
from moma.recipe import check

CONTENTS = ("singles", "placed", "compositions", "illustrated")


def image_of(document: Document) -> ImageRef:
    (image,) = (part for part in document.segments if isinstance(part, ImageRef))
    return image


def sketch_of(document: Document) -> Sketch:
    """The sketch that a document's image will draw."""
    sketch, _ = image_of(document).read.args  # type: ignore[attr-defined]
    return sketch


def test_the_first_hundred_objects_are_drawn_in_both_styles():
    names = object_names(100)
    assert len(set(names)) == 100
    assert object_names(120)[:100] == names
    for name in names[::9]:
        flat, outlined = (np.asarray(render(name, style, 32)) for style in STYLES)
        assert flat.shape == outlined.shape == (32, 32, 3)
        assert flat.min() < 250
        assert outlined.min() < 250
        assert not np.array_equal(flat, outlined)


def test_all_objects_can_be_used_and_more_are_refused():
    assert len(object_names(3900)) == 3900
    with pytest.raises(UserError, match="only 39"):
        object_names(5000)


def test_nothing_held_out_appears_in_training_in_any_content():
    pairs: set[frozenset[str]] = set()
    styles: set[tuple[str, str]] = set()
    for content in CONTENTS:
        for document in SketchesConfig.model_validate(
            {"content": content, "count": 3000}
        ).documents():
            if document.held_out:
                continue
            sketch = sketch_of(document)
            styles |= {(name, sketch.style) for name in sketch.names}
            pairs |= {frozenset(sketch.names)} if len(sketch.names) == 2 else set()
    assert not any(is_held_out_style(name, style) for name, style in styles)
    assert not any(is_held_out_pair(*pair) for pair in pairs)
    # Every object is seen in at least one style.
    assert {name for name, _ in styles} == set(object_names(100))


def test_about_a_tenth_is_held_out():
    names = object_names(1000)
    drawings = [is_held_out_style(name, style) for name in names for style in STYLES]
    assert 0.08 < np.mean(drawings) < 0.12
    assert not any(all(is_held_out_style(name, style) for style in STYLES) for name in names)
    pairs = [is_held_out_pair(names[i], names[i + 1]) for i in range(999)]
    assert 0.07 < np.mean(pairs) < 0.13
    assert is_held_out_pair(names[3], names[7]) == is_held_out_pair(names[7], names[3])
    documents = list(SketchesConfig(content="compositions", count=2000).documents())
    assert 0.07 < np.mean([bool(document.held_out) for document in documents]) < 0.13


@pytest.mark.parametrize("content", CONTENTS)
def test_documents_are_reproducible_and_have_distinct_names(content):
    config = SketchesConfig(content=content, count=500, repeats=4)
    documents = list(config.documents())
    names = [document.name for document in documents]
    assert len(set(names)) == len(names)
    assert [document.segments[0] for document in documents if document.held_out is None] == []
    again = list(config.documents())
    assert [document.name for document in again] == names
    texts = [[part for part in d.segments if isinstance(part, str)] for d in documents]
    assert texts == [[part for part in d.segments if isinstance(part, str)] for d in again]
    assert image_of(documents[0]).read().tobytes() == image_of(again[0]).read().tobytes()


def test_singles_vary_order_and_wording():
    documents = list(SketchesConfig(content="singles", repeats=20).documents())
    drawings = list(product(object_names(100), STYLES))
    held_out = sum(is_held_out_style(name, style) for name, style in drawings)
    assert sum(document.held_out is True for document in documents) == held_out > 10
    assert len(documents) == 20 * (len(drawings) - held_out) + held_out
    captions = [part for d in documents for part in d.segments if isinstance(part, str)]
    without_style = np.mean(["style" not in caption for caption in captions])
    caption_first = np.mean([isinstance(d.segments[0], str) for d in documents])
    assert 0.12 < without_style < 0.18
    assert 0.71 < caption_first < 0.79
    assert "an apple, flat style" in captions
    assert "an apple" in captions


def test_another_seed_gives_other_compositions():
    one, two = (
        {d.name for d in SketchesConfig(content="compositions", count=200, seed=seed).documents()}
        for seed in (0, 1)
    )
    assert len(one & two) < 20


def test_too_many_compositions_are_refused():
    with pytest.raises(UserError, match="take at most"):
        list(SketchesConfig(content="compositions", objects=3, count=1000).documents())


def test_illustrated_documents_interleave_definition_image_and_caption():
    documents = {
        d.name: d for d in SketchesConfig(content="illustrated", caption_first=0).documents()
    }
    before, image, after = documents["apple, flat, illustrated"].segments
    assert isinstance(before, str)
    assert before.startswith("apple: The fleshy pome")
    assert isinstance(image, ImageRef)
    assert isinstance(after, str)
    assert after.startswith("An apple, flat style.")
    assert len(documents) > 150
    for name in object_names(100):
        assert all(len(text) <= 202 for text in short_definitions(name))


@pytest.mark.parametrize(
    ("relation", "first", "second"),
    [
        ("left of", (0, 0, 32, 32), (32, 0, 64, 32)),
        ("right of", (32, 0, 64, 32), (0, 0, 32, 32)),
        ("above", (0, 0, 32, 32), (0, 32, 32, 64)),
        ("below", (0, 32, 32, 64), (0, 0, 32, 32)),
    ],
)
def test_compositions_draw_each_object_in_its_box_on_white(relation, first, second):
    sketch = Sketch(("apple", "rocket"), "flat", relation)
    assert sketch.boxes(64) == (first, second)
    canvas = sketch.draw(64)
    for name, box in (("apple", first), ("rocket", second)):
        assert canvas.crop(box).tobytes() == render(name, "flat", 32).tobytes()
        canvas.paste((255, 255, 255), box)
    assert np.asarray(canvas).min() == 255


def test_transparency_becomes_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    blended = np.asarray(on_white(image))
    assert blended[0, 0].tolist() == [255, 255, 255]
    assert blended[0, 1].tolist() == [127, 127, 127]


def test_a_rendered_image_may_be_modified():
    render("apple", "flat", 32).paste((0, 0, 0), (0, 0, 32, 32))
    assert np.asarray(render("apple", "flat", 32)).max() == 255


def test_captions():
    assert Sketch(("apple",), "flat").caption == "an apple, flat style"
    assert Sketch(("apple",), "flat", "below").caption == "an apple at the bottom, flat style"
    pair = Sketch(("apple", "rocket"), "outlined", "left of")
    assert pair.caption == "an apple left of a rocket, outlined style"
    phrases = [
        with_article(name) for name in ("unicorn", "umbrella", "scissors", "cactus", "bread")
    ]
    assert phrases == ["a unicorn", "an umbrella", "scissors", "a cactus", "bread"]


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="no drawing"):
        render("no such thing", "flat", 32)
    with pytest.raises(UserError, match="flat, outlined"):
        render("apple", "cubist", 32)


def test_the_message_for_a_missing_package_explains_how_to_install_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "resvg_py" else find(name)
    )
    with pytest.raises(UserError, match=r"resvg-py.*pip install 'moma\[demo\]'"):
        render("yo-yo", "outlined", 33)  # no other test draws it, so it is in no cache


def test_sketches_accept_a_name_but_no_held_out_fraction():
    assert SketchesConfig(content="singles").name == "sketches-singles"
    given = check(SketchesConfig, {"content": "singles", "name": "mine"}, "recipe")
    assert given.name == "mine"
    for values, message in (({"held_out": 0.1}, "decide themselves"), ({"name": "a/b"}, "'name'")):
        with pytest.raises(UserError, match=message):
            check(SketchesConfig, {"content": "singles", **values}, "recipe")
