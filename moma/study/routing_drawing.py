"""HTML that draws the routing of a document over its text and images; it needs no script.

Below each token of a text, a bar for each layer has the colors of the experts that process it. An
image is drawn once for each layer, its codes in these colors.
"""

import html
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moma.evaluate.token_routing import GroupRouting, TokenRouting, describe_tokens
from moma.generate.mixed import MixedModel
from moma.images import png_bytes
from moma.study.page import data_url
from moma.study.routing_shapes import (
    EXPLANATIONS,
    NO_EXPERT,
    SKIPPED,
    Box,
    RoutingShapes,
    experts_of,
    group_name,
    visible,
)
from moma.study.tables import percent

STYLE = (Path(__file__).parent / "routing.css").read_text(encoding="utf-8")
_DETAILS = "Point at a token or tap it for the weights."


def draw_routing(mixed: MixedModel, routings: Sequence[TokenRouting], name: str = "routing") -> str:
    """Draw the routings of a document, to be chosen by tabs; `STYLE` is their style.

    Args:
        routings: of the same document.
        name: of the drawing; drawings on one page have different names.
    """
    checked = [" checked", *[""] * len(routings)]
    tabs = "".join(
        f"<input type='radio' name='{name}' id='{name}-{number}'{checked[number]}>"
        f"<label for='{name}-{number}'>{routed.routing} routing</label>"
        for number, routed in enumerate(routings)
    )
    drawn = (Drawing(RoutingShapes(mixed, routed)).html() for routed in routings)
    panes = "".join(f"<section class='pane'>{each}</section>" for each in drawn)
    if len(routings) == 1:
        tabs = tabs.partition("<label")[0]
    return f"<div class='routing'>{tabs}{panes}</div>"


class Drawing:
    """One routing of a document."""

    def __init__(self, shapes: RoutingShapes):
        self._shapes, self._routed, self._mixed = shapes, shapes.routed, shapes.mixed
        self._info = [
            self._describe(position, token)
            for position, token in enumerate(describe_tokens(self._mixed, self._routed))
        ]

    def html(self) -> str:
        """The explanation, the text and images in their order, and the experts' shares."""
        parts = [
            f"<p class='note'>{EXPLANATIONS[self._routed.routing]} {_DETAILS}</p>",
            self._legend(),
        ]
        for is_image, positions in self._shapes.parts():
            if is_image:
                parts.append(self._image(positions))
            else:
                parts.append(f"<div class='text'>{''.join(map(self._token, positions))}</div>")
        return "".join([*parts, *map(self._table, self._routed.groups)])

    def _describe(self, position: int, token: dict[str, Any]) -> str:
        """All about a token: a line for each layer."""
        if "code" in token:
            what = "image {image}, row {row}, column {column}, code {code}".format(**token)
        else:
            what = f"“{visible(token['text'])}”"
        lines = [f"token {position}: {what}"]
        for layer, routed in enumerate(token["layers"]):
            numbers = np.flatnonzero(self._shapes.taken_LSX[layer, position])
            experts = [
                f"{self._shapes.names[number]} × {expert['weight']:.2f}"
                for number, expert in zip(numbers, routed["experts"], strict=True)
            ]
            line = ", ".join(experts) or "no expert"
            if routed["weight"] is None:
                line = "skipped"
            elif layer in self._routed.depth_layers:
                line += f"; update × {routed['weight']:.2f}"
            lines.append(f"layer {layer}: {line}")
        return html.escape("\n".join(lines))

    def _legend(self) -> str:
        entries = [
            f"<li><i {_look(look, 'style', 'background:')}></i>{name}</li>"
            for look, name in self._shapes.legend()
        ]
        return f"<ul class='key'>{''.join(entries)}</ul>"

    def _token(self, position: int) -> str:
        """A token of a text above a bar for each layer."""
        is_special = int(self._routed.ids_S[position]) in self._mixed.model.vocabulary.special
        layers = len(self._shapes.taken_LSX)
        height = layers * (6 if layers <= 8 else 4 if layers <= 16 else 3)
        return (
            f"<div class='{'token mark' if is_special else 'token'}' tabindex='0' "
            f"data-info='{self._info[position]}'>"
            f"<span>{html.escape(self._shapes.text(position))}</span>"
            f"<svg viewBox='0 0 1 {layers}' preserveAspectRatio='none' height='{height}'>"
            f"{_paths(self._shapes.column(position))}</svg></div>"
        )

    def _image(self, positions: Sequence[int]) -> str:
        """An image with a cell to point at for each code, and once for each layer."""
        side = round(len(positions) ** 0.5)
        url = data_url(png_bytes(self._shapes.image(positions), optimize=True))
        cells = "".join(f"<b tabindex='0' data-info='{self._info[n]}'></b>" for n in positions)
        layers = [
            f"<figure><div class='picture'><svg viewBox='0 0 {side} {side}'>"
            f"{_paths(self._shapes.grid(layer, positions))}</svg></div><figcaption>layer {layer}: "
            f"{self._shapes.taken_in(layer, positions)} of {len(positions)}</figcaption></figure>"
            for layer in range(len(self._shapes.taken_LSX))
        ]
        return (
            f"<div class='image' style='--image:url({url});--side:{side}'>"
            f"<div class='picture'><div class='cells'>{cells}</div></div>"
            f"<div class='layers'>{''.join(layers)}</div></div>"
        )

    def _table(self, group: GroupRouting) -> str:
        """A table: of a group's tokens, the share that each expert, and no expert, processes."""
        vocabulary = self._mixed.model.vocabulary
        indices = [vocabulary.modalities.index(name) for name in group.modalities]
        own_S = np.isin(vocabulary.modality_of_id[self._routed.ids_S], indices)
        if not own_S.any():
            return ""
        experts = experts_of(group, self._routed.groups)
        head = "".join(f"<th>{name}</th>" for name, _ in experts) + "<th>no expert</th>"
        head += "<th>skipped</th>" if self._routed.depth_layers else ""
        rows = []
        for layer, taken_SE in enumerate(group.taken_LSE[:, own_S]):
            processed_S = self._routed.processed_LS[layer, own_S]
            cells = [
                _bar(taken_S.mean(), f"style='--bar:{color}99;--share:{percent(taken_S.mean())}'")
                for taken_S, (_, color) in zip(taken_SE.T, experts, strict=True)
            ]
            others = [processed_S & ~taken_SE.any(1)]
            others += [~processed_S] if self._routed.depth_layers else []
            cells += [
                _bar(each_S.mean(), f"class='none' style='--share:{percent(each_S.mean())}'")
                for each_S in others
            ]
            rows.append(f"<tr><th>layer {layer}</th>{''.join(cells)}</tr>")
        title = f"Experts of {group_name(group)}: share of the {own_S.sum()} tokens"
        return (
            f"<h3>{title}</h3><div class='shares'><table><tr><th></th>{head}</tr>"
            f"{''.join(rows)}</table></div>"
        )


def _paths(boxes: Iterable[Box]) -> str:
    """A path for the boxes of each look."""
    paths: dict[str, list[str]] = defaultdict(list)
    for look, x, y, width, height in boxes:
        paths[look].append(f"M{x:.4g} {y:.4g}h{width:.4g}v{height:g}h-{width:.4g}z")
    return "".join(
        f"<path {_look(look, 'fill')} d='{''.join(each)}'/>" for look, each in paths.items()
    )


def _look(look: str, attribute: str, before: str = "") -> str:
    """The attribute of an element with this look."""
    return f"class='{look}'" if look in (NO_EXPERT, SKIPPED) else f"{attribute}='{before}{look}'"


def _bar(share: float, look: str) -> str:
    return f"<td {look}>{percent(share)}</td>"
