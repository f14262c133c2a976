"""Does a generated sketch show what its caption names: nearest object by pixel distance.

An image, or each half of a composition, is compared with the codec's own reconstruction of every
object in both styles at the same place; the object of the nearest one is what the image is taken
to show. Chance is one in the number of objects.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import torch
from PIL import Image

from moma.demo import sketches
from moma.demo.drawings import STYLES, render
from moma.generate.decode import Sampling
from moma.generate.mixed import MixedModel
from moma.progress import ProgressCallback
from moma.tokenizers.image.codec import ImageCodec, preprocess

BATCH = 32


@dataclass(frozen=True)
class Sketch:
    """What a caption describes: one object, or two and how the first stands to the second."""

    names: tuple[str, ...]
    style: str
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The words."""
        if self.relation is None:
            return sketches.single_caption(self.names[0], self.style)
        first, second = self.names
        return sketches.composition_caption(first, self.relation, second, self.style)

    def draw(self, size: int) -> Image.Image:
        """The true image, `size` × `size` pixels."""
        if self.relation is None:
            return render(self.names[0], self.style, size)
        first, second = self.names
        return sketches.compose(first, self.relation, second, self.style, size)

    def boxes(self, size: int) -> tuple[sketches.Box, ...]:
        """Where each object stands, in the order of the names."""
        if self.relation is None:
            return (sketches.Box(0, 0, size, size),)
        return sketches.slots(self.relation, size)


@dataclass(frozen=True)
class Drawn:
    """A generated image and what each of its boxes shows by the nearest object."""

    sketch: Sketch
    image: Image.Image
    shows: tuple[str, ...]

    @property
    def right(self) -> tuple[bool, ...]:
        """Whether each box shows the object that the caption names there."""
        return tuple(a == b for a, b in zip(self.shows, self.sketch.names, strict=True))


@dataclass(frozen=True)
class Captioned:
    """A held-out image and the caption that the model wrote for it."""

    sketch: Sketch
    image: Image.Image
    caption: str

    @property
    def right(self) -> bool:
        """Whether the caption names every object of the image."""
        names = (re.escape(name) for name in self.sketch.names)
        return all(re.search(rf"\b{name}\b", self.caption) for name in names)


def seen_singles(objects: int, count: int, seed: int) -> list[Sketch]:
    """Single objects in a style in which training shows them, drawn at random."""
    pairs = product(sketches.object_names(objects), STYLES)
    seen = [Sketch((n,), style) for n, style in pairs if not sketches.is_held_out_style(n, style)]
    return random.Random(seed).sample(seen, min(count, len(seen)))


def held_out_singles(objects: int, count: int, seed: int) -> list[Sketch]:
    """Single objects in a style in which training never shows them, drawn at random."""
    pairs = product(sketches.object_names(objects), STYLES)
    unseen = [Sketch((n,), style) for n, style in pairs if sketches.is_held_out_style(n, style)]
    return random.Random(seed).sample(unseen, min(count, len(unseen)))


def held_out_compositions(objects: int, count: int, seed: int) -> list[Sketch]:
    """Pairs of objects that training never shows together, each in a style it does show."""
    draw = random.Random(seed)
    pairs = [
        (pair, style)
        for pair in permutations(sketches.object_names(objects), 2)
        if sketches.is_held_out_pair(*pair)
        for style in STYLES
        if not any(sketches.is_held_out_style(name, style) for name in pair)
    ]
    chosen = draw.sample(pairs, min(count, len(pairs)))
    return [Sketch(pair, style, draw.choice(sketches.RELATIONS)) for pair, style in chosen]


def draw_sketches(
    model: MixedModel,
    wanted: Sequence[Sketch],
    objects: int,
    sampling: Sampling,
    progress: ProgressCallback = lambda done, note="": None,
) -> list[Drawn]:
    """Generate an image for each caption and tell what it shows."""
    size = model.codec.config.image_size
    nearest = NearestObject(model.codec, sketches.object_names(objects), size)
    drawn = []
    for start in range(0, len(wanted), BATCH):
        part = wanted[start : start + BATCH]
        answers = model.generate([[sketch.caption] for sketch in part], "image", sampling)
        for sketch, (image,) in zip(part, answers, strict=True):
            assert isinstance(image, Image.Image)
            shows = tuple(nearest(image, box) for box in sketch.boxes(size))
            drawn.append(Drawn(sketch, image, shows))
        progress(len(drawn))
    return drawn


def caption_sketches(
    model: MixedModel, shown: Sequence[Sketch], sampling: Sampling
) -> list[Captioned]:
    """Write a caption for each true image."""
    size = model.codec.config.image_size
    images = [sketch.draw(size) for sketch in shown]
    answers = model.generate([[image] for image in images], "text", sampling, new_tokens=32)
    return [
        Captioned(sketch, image, "".join(part for part in answer if isinstance(part, str)))
        for sketch, image, answer in zip(shown, images, answers, strict=True)
    ]


class NearestObject:
    """Tells which object a box of an image shows."""

    def __init__(self, codec: ImageCodec, names: Sequence[str], size: int):
        self.codec, self.names, self.size = codec, names, size
        self._known: dict[sketches.Box, np.ndarray] = {}

    def __call__(self, image: Image.Image, box: sketches.Box) -> str:
        """Name of the object whose reconstruction in `box` has the least squared error."""
        if box not in self._known:
            self._known[box] = self._reconstructions(box)
        crop = np.asarray(image.crop(box), dtype=np.float32)
        errors_R = np.square(self._known[box] - crop).mean(axis=(1, 2, 3))
        return self.names[int(errors_R.argmin()) // len(STYLES)]

    @torch.no_grad()
    def _reconstructions(self, box: sketches.Box) -> np.ndarray:
        """Every object in every style as the codec draws it in `box`: [R, height, width, 3]."""
        images = []
        for name, style in product(self.names, STYLES):
            canvas = Image.new("RGB", (self.size, self.size), "white")
            canvas.paste(render(name, style, box.right - box.left), box[:2])
            images.append(preprocess(canvas, self.size))
        device = self.codec.codebook.device
        crops = []
        for start in range(0, len(images), BATCH):
            batch_B3HW = torch.stack(images[start : start + BATCH]).to(device)
            drawn_BHW3 = self.codec.decode(self.codec.encode(batch_B3HW)).permute(0, 2, 3, 1)
            levels = ((drawn_BHW3.clamp(-1, 1) + 1) * 127.5).round().cpu().numpy()
            crops.append(levels[:, box.top : box.bottom, box.left : box.right])
        return np.concatenate(crops)
