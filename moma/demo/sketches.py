"""Small images with exact captions: emoji in two drawing styles, single and two by two.

Names alone decide what is held out, so that it is the same for every recipe: some pairs of objects
never share a canvas in training, and some objects are never shown in one of the two styles.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
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

Corner = tuple[int, int]
# For each relation of a first object to a second: where the first one is, in words, and column and
# row of both on a canvas of two by two boxes.
POSITIONS: dict[str, tuple[str, Corner, Corner]] = {
    "left of": ("on the left", (0, 0), (1, 0)),
    "right of": ("on the right", (1, 0), (0, 0)),
    "above": ("at the top", (0, 0), (0, 1)),
    "below": ("at the bottom", (0, 1), (0, 0)),
}
RELATIONS = tuple(POSITIONS)
# The relation of the second object to the first.
OPPOSITES = {
    relation: other
    for relation, (_, first, second) in POSITIONS.items()
    for other, (_, *swapped) in POSITIONS.items()
    if swapped == [second, first]
}

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


@dataclass(frozen=True)
class Sketch:
    """An object, or two and the relation of the first to the second, as an image and in words.

    A single object with a relation is drawn where it would be in a composition.
    """

    names: tuple[str, ...]
    style: str
    relation: str | None = None

    @property
    def caption(self) -> str:
        """Such as `an apple, flat style` or `an apple left of a rocket, flat style`."""
        words = [with_article(self.names[0])]
        if len(self.names) > 1:
            words += [str(self.relation), with_article(self.names[1])]
        elif self.relation is not None:
            words.append(POSITIONS[self.relation][0])
        return f"{' '.join(words)}, {self.style} style"

    @property
    def is_held_out(self) -> bool:
        """Whether training does not show the pair of objects, or the object in this style."""
        if len(self.names) > 1:
            return is_held_out_pair(*self.names)
        return is_held_out_style(self.names[0], self.style)

    def boxes(self, size: int) -> tuple[Box, ...]:
        """The box of each object on a canvas of `size` × `size` pixels.

        Boxes begin at multiples of half the canvas, so that an object has the same codes in each.
        """
        if self.relation is None:
            return (Box(0, 0, size, size),)
        half, corners = size // 2, POSITIONS[self.relation][1:][: len(self.names)]
        return tuple(Box(x * half, y * half, (x + 1) * half, (y + 1) * half) for x, y in corners)

    def draw(self, size: int) -> Image.Image:
        """Draw the objects on a white canvas of `size` × `size` pixels, RGB.

        Raises:
            UserError: an object or style is unknown, or a package is missing.
        """
        canvas = Image.new("RGB", (size, size), "white")
        for name, box in zip(self.names, self.boxes(size), strict=True):
            canvas.paste(render(name, self.style, box.right - box.left), box[:2])
        return canvas


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
    repeats: int = Field(default=8, ge=1, le=10**6)
    image_size: int = Field(default=64, ge=8, le=2**13, multiple_of=4)
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
            yield self._document(document, Sketch((name,), style), plain)

    def _placed(self) -> Iterator[Document]:
        for name, style, relation, repeat in self._repeated(RELATIONS):
            sketch = Sketch((name,), style, relation)
            yield self._document(f"{sketch.caption}, {repeat}", sketch)

    def _compositions(self) -> Iterator[Document]:
        for sketch in self._sampled():
            yield self._document(sketch.caption, sketch)

    def _illustrated(self) -> Iterator[Document]:
        for name, style in product(object_names(self.objects), STYLES):
            texts = short_definitions(name)
            if not texts:
                continue
            document, sketch = f"{name}, {style}, illustrated", Sketch((name,), style)
            caption = sketch.caption.capitalize() + "."
            before, after = f"{name}: {texts[0]}", " ".join(texts[1:])
            if self._has_caption_first(document):
                before = f"{before} {caption}"
            else:
                after = f"{caption} {after}".strip()
            segments = (before, self._image(sketch)) + ((after,) if after else ())
            yield Document(document, segments, held_out=sketch.is_held_out)

    def _repeated(self, *more: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
        """Name, style, more and the number of the repeat; a held-out style has one repeat."""
        choices = (object_names(self.objects), STYLES, *more, range(self.repeats))
        for drawing in product(*choices):
            if drawing[-1] == 0 or not is_held_out_style(str(drawing[0]), str(drawing[1])):
                yield drawing

    def _sampled(self) -> Iterator[Sketch]:
        """`count` different compositions, without held-out styles."""
        names = object_names(self.objects)
        # Sampling by rejection: the count must be well below the number of compositions.
        limit = len(names) * (len(names) - 1) * len(RELATIONS) * len(STYLES) // 2
        if self.count > limit:
            raise UserError(
                f"sketches: count = {self.count} compositions of {len(names)} objects; "
                f"take at most {limit}, or more objects"
            )
        generator = random.Random(self.seed)
        seen: set[Sketch] = set()
        while len(seen) < self.count:
            pair = tuple(generator.sample(names, 2))
            relation, style = generator.choice(RELATIONS), generator.choice(STYLES)
            sketch = Sketch(pair, style, relation)
            held_out = any(is_held_out_style(name, style) for name in pair)
            if not held_out and sketch not in seen:
                seen.add(sketch)
                yield sketch

    def _image(self, sketch: Sketch) -> ImageRef:
        return ImageRef(sketch.caption, partial(Sketch.draw, sketch, self.image_size))

    def _document(self, name: str, sketch: Sketch, plain: bool = False) -> Document:
        """An image and its caption, which does not mention the style if it is `plain`."""
        caption = with_article(sketch.names[0]) if plain else sketch.caption
        image, leads = self._image(sketch), self._has_caption_first(name)
        segments = (caption, image) if leads else (image, caption)
        return Document(name, segments, held_out=sketch.is_held_out)

    def _has_caption_first(self, document: str) -> bool:
        return unit_hash(f"caption first: {document}") < self.caption_first


def object_names(count: int) -> tuple[str, ...]:
    """The first `count` objects that can be drawn in both styles.

    Raises:
        UserError: a package is missing, or there are fewer.
    """
    names = tuple(islice(drawings(), count))
    if len(names) < count:
        raise UserError(f"sketches: objects = {count}, but there are only {len(names)}; lower it")
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


def short_definitions(name: str) -> tuple[str, ...]:
    """Up to two definitions of a noun, each cut after a sentence or at a word.

    Raises:
        UserError: the dictionary is not installed.
    """
    texts = definitions(name, "n.")
    return tuple(_shorten(text) for text in texts if len(text) >= _MIN_DEFINITION)[:2]


def _shorten(text: str) -> str:
    """At most `_MAX_DEFINITION` characters: whole sentences if one fits, else whole words."""
    if len(text) > _MAX_DEFINITION:
        head = text[: _MAX_DEFINITION + 1]
        ends = [end.start() for end in _SENTENCE_END.finditer(head, _MIN_DEFINITION)]
        text = head[: ends[-1] if ends else head.rfind(" ")]
    return text.rstrip(" ,;:.-") + "."
