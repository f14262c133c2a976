"""Scores of generated sketches and captions."""

import numpy as np
import pytest
import torch
from PIL import Image

from moma.demo import sketches
from moma.demo.drawings import STYLES, render
from moma.demo.scoring import (
    Captioned,
    Drawn,
    NearestObject,
    held_out_compositions,
    single_sketches,
)
from moma.demo.sketches import Sketch
from moma.tokenizers.image.codec import ImageCodec, preprocess, to_pil
from tests.factories import make_codec

NAMES = sketches.object_names(12)


def random_codec() -> ImageCodec:
    return make_codec(image_size=32, codebook_size=256)


def test_a_reconstruction_is_nearest_to_itself():
    codec = random_codec()
    nearest = NearestObject(codec, NAMES, 32)
    box = sketches.Box(0, 0, 32, 32)
    found = []
    for name in NAMES:
        image = render(name, "flat", 32)
        with torch.no_grad():
            drawn = codec.decode(codec.encode(preprocess(image, 32)[None]))[0]
        found.append(nearest(to_pil(drawn), box))
    # An untrained codec may draw two objects alike; a wrong index would miss nearly all.
    assert np.mean([a == b for a, b in zip(found, NAMES, strict=True)]) > 0.8


def test_the_nearest_object_has_the_least_squared_error():
    codec, box = random_codec(), sketches.Box(0, 16, 16, 32)
    nearest, errors = NearestObject(codec, NAMES, 32), dict[str, int]()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in NAMES:
        for style in STYLES:
            canvas = Image.new("RGB", (32, 32), "white")
            canvas.paste(render(name, style, 16), box[:2])
            drawn = to_pil(codec.decode(codec.encode(preprocess(canvas, 32)[None]))[0])
            difference = np.asarray(drawn, dtype=np.int64)[16:, :16] - noise[16:, :16]
            error = int(np.square(difference).sum())
            errors[name] = min(errors.get(name, error), error)
    assert nearest(Image.fromarray(noise), box) == min(errors, key=lambda name: errors[name])


def test_each_box_is_compared_with_objects_in_that_box():
    codec = random_codec()
    nearest = NearestObject(codec, NAMES, 32)
    for relation in sketches.RELATIONS:
        (box,) = Sketch(NAMES[:1], "outlined", relation).boxes(32)
        found = []
        for name in NAMES:
            image = Sketch((name,), "outlined", relation).draw(32)
            with torch.no_grad():
                drawn = codec.decode(codec.encode(preprocess(image, 32)[None]))[0]
            found.append(nearest(to_pil(drawn), box))
        assert np.mean([a == b for a, b in zip(found, NAMES, strict=True)]) > 0.7


def test_an_object_in_the_wrong_position_is_wrong():
    sketch = Sketch(("apple", "axe"), "flat", "left of")
    image = sketch.draw(32)
    assert Drawn(sketch, image, ("apple", "axe")).correct == (True, True)
    assert Drawn(sketch, image, ("axe", "apple")).correct == (False, False)


@pytest.mark.parametrize(
    ("caption", "is_correct"),
    [
        ("an apple left of a cat, flat style", True),
        ("a cat right of an apple, flat style", True),
        ("a cat left of an apple, flat style", False),
        ("an apple right of a cat, flat style", False),
        ("an apple above a cat, flat style", False),
        ("an apple left of an apple, flat style", False),
        ("a pineapple left of a cat, flat style", False),
        ("an apple left of a caterpillar, flat style", False),
        ("a Japanese apple left of a cat, flat style", False),
        ("Japanese apple left of a cat, flat style", False),
        ("an apple left of a cat face, flat style", False),
        ("flat style. an apple left of a cat", True),
        ("an apple and a cat, flat style", False),
        ("an apple, flat style", False),
    ],
)
def test_a_caption_must_name_both_objects_and_their_relation(caption, is_correct):
    sketch = Sketch(("apple", "cat"), "flat", "left of")
    assert Captioned(sketch, Image.new("RGB", (4, 4)), caption).correct == is_correct


def test_every_relation_has_the_opposite_that_swaps_the_objects():
    assert sketches.OPPOSITES == {
        "left of": "right of",
        "right of": "left of",
        "above": "below",
        "below": "above",
    }


def test_single_prompts_are_of_training_and_compositions_are_held_out():
    for sketch in single_sketches(100, 30, 0):
        assert not sketches.is_held_out_style(sketch.names[0], sketch.style)
    pairs = held_out_compositions(100, 20, 0)
    assert len(pairs) == 20
    for sketch in pairs:
        assert sketches.is_held_out_pair(*sketch.names)
        assert not any(sketches.is_held_out_style(name, sketch.style) for name in sketch.names)
    assert held_out_compositions(100, 20, 0) == pairs != held_out_compositions(100, 20, 1)
