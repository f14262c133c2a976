"""Scoring of generated sketches by the nearest object in pixel distance.

An image, or each half of a composition, is compared with the codec's own reconstruction of every
object in both styles at the same position; the object of the nearest one is the object shown.
Chance is one divided by the number of objects.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
import torch
from PIL import Image

from moma.demo.drawings import STYLES, render
from moma.demo.sketches import (
    OPPOSITES,
    RELATIONS,
    Box,
    Sketch,
    is_held_out_pair,
    is_held_out_style,
    object_names,
    with_article,
)
from moma.generate.mixed import MixedModel
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.progress import ProgressCallback
from moma.tokenizers.image.codec import ImageCodec, preprocess, to_pixels

# Images that are generated, and reconstructed, at a time; in larger batches codecs are not faster.
_GENERATED, _RECONSTRUCTED = 128, 64
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Drawn:
    """A generated image and the nearest object of each of its boxes."""

    sketch: Sketch
    image: Image.Image
    shows: tuple[str, ...]

    @property
    def correct(self) -> tuple[bool, ...]:
        """Whether each box shows the object that the caption names there."""
        return tuple(a == b for a, b in zip(self.shows, self.sketch.names, strict=True))


@dataclass(frozen=True)
class Captioned:
    """A held-out composition and the caption that the model generated for it."""

    sketch: Sketch
    image: Image.Image
    caption: str

    @property
    def correct(self) -> bool:
        """Whether the caption names both objects and their relation, in either order.

        `a cat left of a dog` and `a dog right of a cat` describe the same image. A name is a whole
        noun phrase: it begins the caption or follows an article, and ends it or precedes a
        punctuation mark.
        """
        (first, second), relation = self.sketch.names, str(self.sketch.relation)
        descriptions = ((first, relation, second), (second, OPPOSITES[relation], first))
        phrases = (re.escape(f"{a} {by} {with_article(b)}") for a, by, b in descriptions)
        caption = self.caption.strip()
        return any(re.search(rf"(^|\ban? ){phrase}([,.]|$)", caption) for phrase in phrases)


def single_sketches(objects: int, count: int, seed: int) -> list[Sketch]:
    """A random sample of single objects in styles that training shows."""
    drawn = (Sketch((name,), style) for name, style in product(object_names(objects), STYLES))
    sketches = [each for each in drawn if not each.is_held_out]
    return random.Random(seed).sample(sketches, min(count, len(sketches)))


def held_out_compositions(objects: int, count: int, seed: int) -> list[Sketch]:
    """A random sample of held-out pairs of objects, each in a style that training shows."""
    generator, pairs = random.Random(seed), _held_out_pairs(objects)
    sampled = generator.sample(pairs, min(count, len(pairs)))
    return [Sketch(pair, style, generator.choice(RELATIONS)) for pair, style in sampled]


@lru_cache(maxsize=1)  # it hashes every pair
def _held_out_pairs(objects: int) -> list[tuple[tuple[str, ...], str]]:
    return [
        (pair, style)
        for pair in permutations(object_names(objects), 2)
        if is_held_out_pair(*pair)
        for style in STYLES
        if not any(is_held_out_style(name, style) for name in pair)
    ]


def draw_sketches(
    model: MixedModel,
    wanted: Sequence[Sketch],
    nearest: "NearestObject",
    progress: ProgressCallback,
) -> list[Drawn]:
    """Generate an image for each caption greedily, and find the objects that it shows.

    Args:
        nearest: finds objects in images of the model's codec.
    """
    size = model.codec.config.image_size
    drawn = []
    for start in range(0, len(wanted), _GENERATED):
        part = wanted[start : start + _GENERATED]
        answers = model.generate([[sketch.caption] for sketch in part], Settings("image", GREEDY))
        for sketch, (image,) in zip(part, answers, strict=True):
            assert isinstance(image, Image.Image)
            shows = tuple(nearest(image, box) for box in sketch.boxes(size))
            drawn.append(Drawn(sketch, image, shows))
        progress(len(drawn))
    return drawn


def caption_sketches(model: MixedModel, shown: Sequence[Sketch]) -> list[Captioned]:
    """Generate a caption for each true image greedily."""
    images = [sketch.draw(model.codec.config.image_size) for sketch in shown]
    answers = model.generate([[image] for image in images], Settings("text", GREEDY, new_tokens=32))
    return [
        Captioned(sketch, image, "".join(part for part in answer if isinstance(part, str)))
        for sketch, image, answer in zip(shown, images, answers, strict=True)
    ]


class NearestObject:
    """Finds the object that a box of an image shows."""

    def __init__(self, codec: ImageCodec, names: Sequence[str], size: int):
        self.codec, self.names, self.size = codec, names, size
        # For each box, vectors of the reconstructions' pixels, and their squared lengths.
        self._references: dict[Box, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, image: Image.Image, box: Box) -> str:
        """Name of the object whose reconstruction in `box` has the least squared error."""
        if box not in self._references:
            reference_RP = self._reconstruct(box)
            self._references[box] = reference_RP, np.square(reference_RP).sum(1)
        reference_RP, square_R = self._references[box]
        pixels_P = np.asarray(image.crop(box), dtype=np.float64).ravel()
        # |r − p|² without |p|², which is the same for all; these are exact integers.
        nearest = (square_R - 2 * (reference_RP @ pixels_P)).argmin()
        return self.names[int(nearest) // len(STYLES)]

    @torch.no_grad()
    def _reconstruct(self, box: Box) -> np.ndarray:
        """The pixels of every object in every style, as reconstructed in `box`: [R, P]."""
        images = []
        for name, style in product(self.names, STYLES):
            canvas = Image.new("RGB", (self.size, self.size), "white")
            canvas.paste(render(name, style, box.right - box.left), box[:2])
            images.append(preprocess(canvas, self.size))
        crops = []
        for start in range(0, len(images), _RECONSTRUCTED):
            batch_B3HW = torch.stack(images[start : start + _RECONSTRUCTED])
            codes_BL = self.codec.encode(batch_B3HW.to(self.codec.codebook.device))
            pixels_BHW3 = to_pixels(self.codec.decode(codes_BL))
            crops.append(pixels_BHW3[:, box.top : box.bottom, box.left : box.right].flatten(1))
        return torch.cat(crops).cpu().numpy().astype(np.float64)
