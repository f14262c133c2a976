"""A plot of the routing of a document, for papers and slides; see `routing_drawing.py`."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moma.evaluate.token_routing import TokenRouting
from moma.generate.mixed import MixedModel
from moma.study.routing_shapes import EXPLANATIONS, NO_EXPERT, SKIPPED, Box, RoutingShapes

# In inches.
_WIDTH, _MARGIN = 10.0, 0.25
_LINE, _LETTER, _BAR = 0.2, 0.078, 0.05
_IMAGE, _LAYER = 2.0, 1.2
_GRAYS = {NO_EXPERT: "#e6e9ef", SKIPPED: "#5d6878"}


def plot_routing(mixed: MixedModel, routings: Sequence[TokenRouting], title: str) -> Figure:
    """Plot the routings of a document, one below the other."""
    plot = Figure(figsize=(_WIDTH, 1))
    axes = plot.add_axes((0, 0, 1, 1))
    axes.axis("off")
    drawn = _Plot(axes)
    drawn.line(title, 11, weight="bold")
    for routed in routings:
        drawn.routing(RoutingShapes(mixed, routed))
    plot.set_size_inches(_WIDTH, drawn.y + _MARGIN)
    axes.set(xlim=(0, _WIDTH), ylim=(drawn.y + _MARGIN, 0), aspect="equal")
    return plot


class _Plot:
    """Places what is drawn from left to right and from top to bottom, in inches."""

    def __init__(self, axes: Axes):
        self._axes = axes
        self._x, self.y = _MARGIN, _MARGIN

    def line(self, text: str, size: float, **look: str) -> None:
        self._text(_MARGIN, self.y, text, size, **look)
        self.y += 1.8 * size / 72

    def routing(self, shapes: RoutingShapes) -> None:
        self.y += _LINE
        self.line(f"{shapes.routed.routing} routing", 10, weight="bold")
        self.line(EXPLANATIONS[shapes.routed.routing], 8)
        self._x = _MARGIN
        for look, name in shapes.legend():
            x = self._advance(0.45 + _LETTER * len(name), _LINE)
            self._boxes([Box(look, 0, 0, 1, 1)], x, self.y, 0.12, 0.12)
            self._text(x + 0.18, self.y, name, 8)
        self._end_line(2 * _LINE)
        for is_image, positions in shapes.parts():
            self._image(shapes, positions) if is_image else self._tokens(shapes, positions)

    def _tokens(self, shapes: RoutingShapes, positions: Sequence[int]) -> None:
        height = _LINE + _BAR * len(shapes.taken_LSX) + 0.12
        for position in positions:
            text = shapes.text(position)
            width = 0.04 + _LETTER * max(2, len(text))
            x = self._advance(width + 0.04, height)
            self._text(x + 0.02, self.y, text, 9, family="monospace")
            self._boxes(shapes.column(position), x, self.y + _LINE, width, _BAR)
        self._end_line(height)

    def _image(self, shapes: RoutingShapes, positions: Sequence[int]) -> None:
        image, side = shapes.image(positions).convert("RGB"), round(len(positions) ** 0.5)
        x, top = self._advance(_IMAGE + 0.2, _IMAGE), self.y
        self._pixels(np.asarray(image), x, top, _IMAGE)
        gray = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
        left = self._x
        for layer in range(len(shapes.taken_LSX)):
            if self._x + _LAYER > _WIDTH - _MARGIN:
                self._x, self.y = left, self.y + _LAYER + _LINE
            self._pixels(gray, self._x, self.y, _LAYER)
            boxes = [box for box in shapes.grid(layer, positions) if box.look != NO_EXPERT]
            self._boxes(boxes, self._x, self.y, _LAYER / side, _LAYER / side, 0.72)
            taken = f"layer {layer}: {shapes.taken_in(layer, positions)} of {len(positions)}"
            self._text(self._x, self.y + _LAYER + 0.02, taken, 7)
            self._x += _LAYER + 0.12
        self.y = max(self.y + _LAYER + _LINE, top + _IMAGE)
        self._end_line(0.12)

    def _advance(self, width: float, height: float) -> float:
        """Take a place in the line, or in the next one of this height; return its left edge."""
        if self._x > _MARGIN and self._x + width > _WIDTH - _MARGIN:
            self._end_line(height)
        self._x += width
        return self._x - width

    def _end_line(self, height: float) -> None:
        self._x, self.y = _MARGIN, self.y + height

    def _text(self, x: float, y: float, text: str, size: float, **look: str) -> None:
        # Otherwise a dollar sign would begin a formula.
        self._axes.text(
            x,
            y,
            text,
            fontsize=size,
            va="top",
            color="#1d2430",
            parse_math=False,
            **look,  # type: ignore[arg-type]
        )

    def _pixels(self, pixels: np.ndarray, x: float, y: float, size: float) -> None:
        self._axes.imshow(pixels, extent=(x, x + size, y + size, y), interpolation="nearest")

    def _boxes(
        self,
        boxes: Iterable[Box],
        x: float,
        y: float,
        width: float,
        height: float,
        opacity: float = 1.0,
    ) -> None:
        """Draw boxes in cells of this size from an upper left corner."""
        for look, left, top, wide, high in boxes:
            corner = x + left * width, y + top * height
            color = _GRAYS.get(look, look)
            self._axes.add_patch(
                Rectangle(corner, wide * width, high * height, color=color, lw=0, alpha=opacity)
            )
