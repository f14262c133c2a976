"""Small images with exact captions: emoji in two drawing styles, single and two by two.

Names alone decide what is held out, so that it is the same for every recipe: some pairs of objects
never share a canvas in training, and some objects are never shown in one of the two styles.
"""

import random
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice, product
from typing import Any, Literal, NamedTuple

from PIL import Image
from pydantic import Field, field_validator, model_validator

from moma.data.documents import Document, ImageRef, SourceConfig, unit_hash
from moma.demo.dictionary import definitions
from moma.demo.drawings import STYLES, drawings, render
from moma.errors import UserError
from moma.recipe import Seed

# Where the first object of each relation is.
POSITIONS = {
    "left of": "on the left",
    "right of": "on the right",
    "above": "at the top",
    "below": "at the bottom",
}
RELATIONS = tuple(POSITIONS)

_UNCOUNTED = frozenset({"bread", "broccoli", "fire"})
_CONSONANT_SOUNDS = ("uni", "eu", "one", "ut", "u-")
# Three letters before the stop: "esp. one" and "E. Africana" do not end a sentence.
_SENTENCE_END = re.compile(r"(?<=[a-z]{3})[.;] ")
_WITHOUT_STYLE = 0.15
_HELD_OUT_PAIRS = 0.1
_HELD_OUT_STYLES = 0.1
_MAX_DEFINITION = 200
_MIN_DEFINITION = 20


class Box(NamedTuple):
    """A square of a canvas, in pixels; `right` and `bottom` are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


class SketchesConfig(SourceConfig):
    """Sketches as a source; it decides itself which documents are held out.

    Attributes:
        content: `singles` (one object), `placed` (one at half size, where a composition would put
            it), `compositions` (two objects and their relation) or `illustrated` (a definition, an
            image and its caption in one document).
        objects: number of objects: the first 100 have plain names and distinct looks, then follow
            all others that exist in both styles, skin tones last.
        count: number of compositions.
        repeats: documents for each image of `singles` and `placed`; they differ in order and
            wording. A held-out image has one.
        image_size: side of an image in pixels, a multiple of 4.
        seed: seed of the compositions.
        caption_first: fraction of documents whose caption comes before the image.
        name: name of its shards and in messages; by default `sketches-` and the content.
    """

    kind: Literal["sketches"] = "sketches"
    content: Literal["singles", "placed", "compositions", "illustrated"]
    objects: int = Field(default=100, ge=2)
    count: int = Field(default=4000, ge=1)
    repeats: int = Field(default=8, ge=1)
    image_size: int = Field(default=64, ge=8, multiple_of=4)
    seed: Seed = 0
    caption_first: float = Field(default=0.75, ge=0, le=1)

    @field_validator("held_out")
    @classmethod
    def _refuse_held_out(cls, share: float | None) -> float | None:
        if share is not None:
            raise ValueError("sketches decide themselves what is held out; leave it out")
        return share

    @model_validator(mode="before")
    @classmethod
    def _name_by_content(cls, values: Any) -> Any:
        if isinstance(values, dict) and "name" not in values and "content" in values:
            return {**values, "name": f"sketches-{values['content']}"}
        return values

    def documents(self) -> Iterator[Document]:
        """Yield every document of this content, in a fixed order.

        Raises:
            UserError: a package is missing, or `objects` or `count` is too large.
        """
        return {
            "singles": self._singles,
            "placed": self._placed,
            "compositions": self._compositions,
            "illustrated": self._illustrated,
        }[self.content]()

    def _singles(self) -> Iterator[Document]:
        for name, style, repeat in self._repeated():
            document = f"{name}, {style}, {repeat}"
            plain = unit_hash(f"without style: {document}") < _WITHOUT_STYLE
            caption = single_caption(name, None if plain else style)
            held_out = is_held_out_style(name, style)
            yield self._captioned(document, caption, self._image(name, style), held_out)

    def _placed(self) -> Iterator[Document]:
        for name, style, relation, repeat in self._repeated(RELATIONS):
            caption = placed_caption(name, relation, style)
            image = ImageRef(caption, partial(place, name, relation, style, self.image_size))
            held_out = is_held_out_style(name, style)
            yield self._captioned(f"{caption}, {repeat}", caption, image, held_out)

    def _compositions(self) -> Iterator[Document]:
        for first, relation, second, style in self._sampled():
            caption = composition_caption(first, relation, second, style)
            read = partial(compose, first, relation, second, style, self.image_size)
            held_out = is_held_out_pair(first, second)
            yield self._captioned(caption, caption, ImageRef(caption, read), held_out)

    def _illustrated(self) -> Iterator[Document]:
        for name, style in product(object_names(self.objects), STYLES):
            texts = short_definitions(name)
            if not texts:
                continue
            document = f"{name}, {style}, illustrated"
            caption = single_caption(name, style).capitalize() + "."
            before, after = f"{name}: {texts[0]}", " ".join(texts[1:])
            if self._has_caption_first(document):
                before = f"{before} {caption}"
            else:
                after = f"{caption} {after}".strip()
            segments = (before, self._image(name, style), after)
            yield Document(
                name=document,
                segments=tuple(segment for segment in segments if segment),
                held_out=is_held_out_style(name, style),
            )

    def _repeated(self, *more: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
        """Name, style, more and the number of the repeat; a held-out style has one repeat."""
        choices = (object_names(self.objects), STYLES, *more, range(self.repeats))
        for drawing in product(*choices):
            if drawing[-1] == 0 or not is_held_out_style(str(drawing[0]), str(drawing[1])):
                yield drawing

    def _sampled(self) -> Iterator[tuple[str, str, str, str]]:
        """`count` different (first, relation, second, style), without held-out styles."""
        names = object_names(self.objects)
        # Sampling by rejection: the count must be well below the number of compositions.
        limit = len(names) * (len(names) - 1) * len(RELATIONS) * len(STYLES) // 2
        if self.count > limit:
            raise UserError(
                f"sketches: count = {self.count} compositions of {len(names)} objects; "
                f"take at most {limit}, or more objects"
            )
        generator = random.Random(self.seed)
        seen: set[tuple[str, str, str, str]] = set()
        while len(seen) < self.count:
            first, second = generator.sample(names, 2)
            relation, style = generator.choice(RELATIONS), generator.choice(STYLES)
            composition = (first, relation, second, style)
            held_out = is_held_out_style(first, style) or is_held_out_style(second, style)
            if not held_out and composition not in seen:
                seen.add(composition)
                yield composition

    def _image(self, name: str, style: str) -> ImageRef:
        return ImageRef(single_caption(name, style), partial(render, name, style, self.image_size))

    def _captioned(self, name: str, caption: str, image: ImageRef, held_out: bool) -> Document:
        segments = (caption, image) if self._has_caption_first(name) else (image, caption)
        return Document(name=name, segments=segments, held_out=held_out)

    def _has_caption_first(self, document: str) -> bool:
        return unit_hash(f"caption first: {document}") < self.caption_first


def object_names(count: int) -> tuple[str, ...]:
    """The first `count` objects that can be drawn in both styles.

    Raises:
        UserError: a package is missing, or there are fewer.
    """
    names = tuple(islice(drawings(), count))
    if len(names) < count:
        raise UserError(f"sketches: objects = {count}, but there are only {len(names)}")
    return names


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether two objects, in either order, never share a canvas in training."""
    return unit_hash("pair: " + " | ".join(sorted((first, second)))) < _HELD_OUT_PAIRS


def is_held_out_style(name: str, style: str) -> bool:
    """Whether training shows an object only in the other style."""
    if unit_hash(f"style: {name}") >= _HELD_OUT_STYLES * len(STYLES):
        return False
    return style == STYLES[int(unit_hash(f"which: {name}") * len(STYLES))]


def with_article(name: str) -> str:
    """`an apple`, `a unicorn`; plurals, substances and proper names have no article."""
    plural = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    if plural or name in _UNCOUNTED or name[:1].isupper():
        return name
    vowel = name.startswith(tuple("aeiou")) and not name.startswith(_CONSONANT_SOUNDS)
    return f"{'an' if vowel else 'a'} {name}"


def single_caption(name: str, style: str | None) -> str:
    """Caption of one object: `an apple, flat style`, or `an apple` without a style."""
    return with_article(name) + (f", {style} style" if style else "")


def placed_caption(name: str, relation: str, style: str) -> str:
    """Caption of one object that is the first of a relation: `an apple on the left, flat style`."""
    return f"{with_article(name)} {POSITIONS[relation]}, {style} style"


def composition_caption(first: str, relation: str, second: str, style: str) -> str:
    """Caption of two objects: `an apple left of a rocket, flat style`."""
    return f"{with_article(first)} {relation} {with_article(second)}, {style} style"


def short_definitions(name: str) -> tuple[str, ...]:
    """Up to two definitions of a noun, each cut after a sentence or at a word.

    Raises:
        UserError: the dictionary is not installed.
    """
    texts = definitions(name, "n.")
    return tuple(_shorten(text) for text in texts if len(text) >= _MIN_DEFINITION)[:2]


def slots(relation: str, size: int) -> tuple[Box, Box]:
    """Boxes of the two objects of a composition on a canvas of `size` × `size` pixels.

    All begin at a multiple of half the canvas, so that an object has the same codes in each.

    Raises:
        UserError: the relation is unknown.
    """
    half = size // 2
    corner, right, below = (
        Box(left, top, left + half, top + half) for left, top in ((0, 0), (half, 0), (0, half))
    )
    boxes = {
        "left of": (corner, right),
        "right of": (right, corner),
        "above": (corner, below),
        "below": (below, corner),
    }
    if relation not in boxes:
        raise UserError(f"relation '{relation}': use one of {', '.join(RELATIONS)}")
    return boxes[relation]


def compose(first: str, relation: str, second: str, style: str, size: int) -> Image.Image:
    """Draw two objects at half size on a white canvas of `size` × `size` pixels, RGB.

    Raises:
        UserError: an object, style or relation is unknown, or a package is missing.
    """
    canvas = place(first, relation, style, size)
    _draw(canvas, second, style, slots(relation, size)[1])
    return canvas


def place(name: str, relation: str, style: str, size: int) -> Image.Image:
    """Draw one object at half size as the first object of a relation, RGB.

    Raises:
        UserError: an object, style or relation is unknown, or a package is missing.
    """
    canvas = Image.new("RGB", (size, size), "white")
    _draw(canvas, name, style, slots(relation, size)[0])
    return canvas


def _draw(canvas: Image.Image, name: str, style: str, box: Box) -> None:
    canvas.paste(render(name, style, box.right - box.left), (box.left, box.top))


def _shorten(text: str) -> str:
    """At most `_MAX_DEFINITION` characters: whole sentences if one fits, else whole words."""
    if len(text) > _MAX_DEFINITION:
        head = text[: _MAX_DEFINITION + 1]
        ends = [end.start() for end in _SENTENCE_END.finditer(head, _MIN_DEFINITION)]
        text = head[: ends[-1] if ends else head.rfind(" ")]
    return text.rstrip(" ,;:.-") + "."
