"""What drawings of a routing share: its parts, the experts' names and colors, and boxes.

Layers and experts are numbered from 0, as in recipes and logs. Shapes: as in `token_routing.py`; X
experts of all groups, group by group.
"""

import colorsys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from moma.evaluate.token_routing import GroupRouting, TokenRouting
from moma.generate.mixed import MixedModel

EXPLANATIONS = {
    "causal": "Each token is routed by itself, as in generation.",
    "auxiliary": "Each token is routed by itself, by auxiliary routers.",
    "threshold": "Each token is routed by itself, by thresholds.",
    "half": "Each token is routed by itself; depth routers take those with a score above one half.",
    "choice": "Experts, and layers with mixture-of-depths, choose among the tokens of a "
    "micro-batch, as in training; the document takes the place of its first sequence.",
}
# Looks of a box that has no expert's color.
NO_EXPERT, SKIPPED = "no", "skip"
# Distinguishable from each other on light and on dark backgrounds.
_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#d4a82a", "#4fb0ae", "#9c755f")
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥"})


class Cell(NamedTuple):
    """A token in a layer, and its upper left corner in units of cells."""

    layer: int
    token: int
    x: int
    y: int


class Box(NamedTuple):
    """A rectangle in units of cells; its look is a color, `NO_EXPERT` or `SKIPPED`."""

    look: str
    x: float
    y: float
    width: float
    height: float


class RoutingShapes:
    """One routing of a document.

    Attributes:
        taken_LSX: whether an expert of a layer processes a token.
        names, colors: of each expert.
    """

    def __init__(self, mixed: MixedModel, routed: TokenRouting):
        self.mixed, self.routed = mixed, routed
        self.taken_LSX = np.concatenate([group.taken_LSE for group in routed.groups], axis=2)
        experts = [each for group in routed.groups for each in experts_of(group, routed.groups)]
        self.names, self.colors = zip(*experts, strict=True)

    def parts(self) -> Iterator[tuple[bool, list[int]]]:
        """Yield texts and images in their order: whether it is an image, and its positions."""
        is_code_S = self.mixed.model.vocabulary.code_of_id[self.routed.ids_S] >= 0
        changes = np.flatnonzero(np.diff(is_code_S)) + 1
        for positions in np.split(np.arange(len(is_code_S)), changes):
            yield bool(is_code_S[positions[0]]), positions.tolist()

    def legend(self) -> list[tuple[str, str]]:
        """Look and name of what occurs."""
        entries = dict(zip(self.colors, self.names, strict=True)) | {NO_EXPERT: "no expert"}
        if self.routed.depth_layers:
            entries[SKIPPED] = "layer skipped"
        return list(entries.items())

    def text(self, position: int) -> str:
        """The text of a token, with line breaks and tabs made visible."""
        id_ = int(self.routed.ids_S[position])
        return visible(self.mixed.tokenizer.decode([id_], skip_special_tokens=False))

    def image(self, positions: Sequence[int]) -> Image.Image:
        """The image of these codes."""
        code_of_id = self.mixed.model.vocabulary.code_of_id
        return self.mixed.image(code_of_id[self.routed.ids_S[positions]])

    def taken_in(self, layer: int, positions: Sequence[int]) -> int:
        """The number of these tokens that experts of a layer process."""
        return int(self.taken_LSX[layer, positions].any(1).sum())

    def column(self, position: int) -> list[Box]:
        """A token's boxes: one below the other for each layer."""
        cells = (Cell(layer, position, 0, layer) for layer in range(len(self.taken_LSX)))
        return self._boxes(cells, 0.8, 0.2)

    def grid(self, layer: int, positions: Sequence[int]) -> list[Box]:
        """The boxes of an image's codes in a layer."""
        side = round(len(positions) ** 0.5)
        cells = (Cell(layer, n, i % side, i // side) for i, n in enumerate(positions))
        return self._boxes(cells, 1, 1)

    def _boxes(self, cells: Iterable[Cell], height: float, skipped: float) -> list[Box]:
        """Fill cells with the colors of the experts, side by side if there are several.

        Args:
            height: of an expert's color in its cell.
            skipped: height of the mark of a skipped layer.
        """
        found: list[Box] = []
        for layer, token, x, y in cells:
            if not self.routed.processed_LS[layer, token]:
                found.append(Box(SKIPPED, x, y + (height - skipped) / 2, 1, skipped))
                continue
            experts = np.flatnonzero(self.taken_LSX[layer, token])
            looks = [self.colors[expert] for expert in experts] or [NO_EXPERT]
            width = 1 / len(looks)
            for place, look in enumerate(looks):
                found.append(Box(look, x + place * width, y, width, height))
        return found


def visible(text: str) -> str:
    """A text with line breaks and tabs made visible."""
    return text.translate(_VISIBLE)


def group_name(group: GroupRouting) -> str:
    """The modalities of a group of experts."""
    return " and ".join(group.modalities)


def experts_of(group: GroupRouting, groups: Sequence[GroupRouting]) -> list[tuple[str, str]]:
    """Name and color of each expert of a group: different from all that share its modalities."""
    sharing = [each for each in groups if set(each.modalities) & set(group.modalities)]
    counts = [each.taken_LSE.shape[2] for each in sharing]
    own = next(number for number, each in enumerate(sharing) if each is group)
    first, total = sum(counts[:own]), sum(counts)
    prefix = f"{group_name(group)} " if len(sharing) > 1 else ""
    return [
        (f"{prefix}expert {expert}", _color(first + expert, total)) for expert in range(counts[own])
    ]


def _color(number: int, total: int) -> str:
    if total <= len(_COLORS):
        return _COLORS[number]
    # Neighbors are far apart on the circle of hues.
    hue, lightness = number * 137.5 % 360 / 360, 0.45 + 0.1 * (number % 3)
    return "#" + "".join(
        f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, 0.5)
    )
