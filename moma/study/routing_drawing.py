"""HTML that draws the routing of a document over its text and images; it needs no script.

Below each token of a text, a bar for each layer has the colors of the experts that process it. An
image is drawn once for each layer, its codes in these colors. Layers and experts are numbered from
0, as in recipes and logs.

Shapes: as in `token_routing.py`; X experts of all groups, group by group.
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
from moma.study.tables import percent

STYLE = (Path(__file__).parent / "routing.css").read_text(encoding="utf-8")
# Distinguishable from each other on light and on dark backgrounds.
_COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#d4a82a", "#4fb0ae", "#9c755f")
_EXPLANATIONS = {
    "causal": "Each token is routed by itself, as in generation.",
    "auxiliary": "Each token is routed by itself, by auxiliary routers.",
    "threshold": "Each token is routed by itself, by thresholds.",
    "half": "Each token is routed by itself; depth routers take those with a score above one half.",
    "choice": "Experts, and layers with mixture-of-depths, choose among the tokens of a "
    "micro-batch, as in training; the document takes the place of its first sequence.",
}
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥"})
_DETAILS = "Point at a token or tap it for the weights."
# A cell of a drawing: layer, token, and its upper left corner in units of cells.
_Cell = tuple[int, int, int, int]


def draw_routing(mixed: MixedModel, routings: Sequence[TokenRouting]) -> str:
    """Draw the routings of a document, to be chosen by tabs; `STYLE` is their style."""
    checked = [" checked", *[""] * len(routings)]
    tabs = "".join(
        f"<input type='radio' name='routing' id='routing-{number}'{checked[number]}>"
        f"<label for='routing-{number}'>{routed.routing} routing</label>"
        for number, routed in enumerate(routings)
    )
    drawn = (Drawing(mixed, routed).html() for routed in routings)
    panes = "".join(f"<section class='pane'>{each}</section>" for each in drawn)
    if len(routings) == 1:
        tabs = tabs.partition("<label")[0]
    return f"<div class='routing'>{tabs}{panes}</div>"


class Drawing:
    """One routing of a document."""

    def __init__(self, mixed: MixedModel, routed: TokenRouting):
        self._mixed, self._routed = mixed, routed
        self._taken_LSX = np.concatenate([group.taken_LSE for group in routed.groups], axis=2)
        experts = [expert for group in routed.groups for expert in _experts(group, routed.groups)]
        self._names, self._colors = zip(*experts, strict=True)
        self._info = [
            self._describe(index, token)
            for index, token in enumerate(describe_tokens(mixed, routed))
        ]

    def html(self) -> str:
        """The explanation, the text and images in their order, and the experts' shares."""
        vocabulary, ids_S = self._mixed.model.vocabulary, self._routed.ids_S
        is_code_S = vocabulary.code_of_id[ids_S] >= 0
        parts = [
            f"<p class='note'>{_EXPLANATIONS[self._routed.routing]} {_DETAILS}</p>",
            self._legend(),
        ]
        changes = np.flatnonzero(np.diff(is_code_S)) + 1
        for positions in np.split(np.arange(len(ids_S)), changes):
            if is_code_S[positions[0]]:
                parts.append(self._image(positions.tolist()))
            else:
                tokens = "".join(map(self._token, positions.tolist()))
                parts.append(f"<div class='text'>{tokens}</div>")
        return "".join([*parts, *map(self._shares, self._routed.groups)])

    def _describe(self, index: int, token: dict[str, Any]) -> str:
        """All about a token: a line for each layer."""
        if "code" in token:
            what = "image {image}, row {row}, column {column}, code {code}".format(**token)
        else:
            what = f"“{token['text'].translate(_VISIBLE)}”"
        lines = [f"token {index}: {what}"]
        for layer, routed in enumerate(token["layers"]):
            numbers = np.flatnonzero(self._taken_LSX[layer, index])
            experts = [
                f"{self._names[number]} × {expert['weight']:.2f}"
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
        shown = dict(zip(self._colors, self._names, strict=True))
        entries = [f"<i style='background:{color}'></i>{name}" for color, name in shown.items()]
        entries.append("<i class='no'></i>no expert")
        if self._routed.depth_layers:
            entries.append("<i class='skip'></i>layer skipped")
        return f"<ul class='key'>{''.join(f'<li>{entry}</li>' for entry in entries)}</ul>"

    def _token(self, index: int) -> str:
        """A token of a text above a bar for each layer."""
        id_ = int(self._routed.ids_S[index])
        text = self._mixed.tokenizer.decode([id_], skip_special_tokens=False)
        layers = len(self._taken_LSX)
        bars = self._paths([(layer, index, 0, layer) for layer in range(layers)], 0.8, 0.2)
        height = layers * (6 if layers <= 8 else 4 if layers <= 16 else 3)
        kind = "token mark" if id_ in self._mixed.model.vocabulary.special else "token"
        return (
            f"<div class='{kind}' tabindex='0' data-info='{self._info[index]}'>"
            f"<span>{html.escape(text.translate(_VISIBLE))}</span>"
            f"<svg viewBox='0 0 1 {layers}' preserveAspectRatio='none' height='{height}'>"
            f"{bars}</svg></div>"
        )

    def _image(self, positions: Sequence[int]) -> str:
        """An image with a cell to point at for each code, and once for each layer."""
        codes = self._mixed.model.vocabulary.code_of_id[self._routed.ids_S[positions]]
        side = round(len(codes) ** 0.5)
        url = data_url(png_bytes(self._mixed.image(codes), optimize=True))
        cells = "".join(f"<b tabindex='0' data-info='{self._info[n]}'></b>" for n in positions)
        layers = []
        for layer in range(len(self._taken_LSX)):
            grid = [(layer, n, place % side, place // side) for place, n in enumerate(positions)]
            taken = int(self._taken_LSX[layer, positions].any(1).sum())
            layers.append(
                f"<figure><div class='picture'><svg viewBox='0 0 {side} {side}'>"
                f"{self._paths(grid, 1, 1)}</svg></div>"
                f"<figcaption>layer {layer}: {taken} of {len(codes)}</figcaption></figure>"
            )
        return (
            f"<div class='image' style='--image:url({url});--side:{side}'>"
            f"<div class='picture'><div class='cells'>{cells}</div></div>"
            f"<div class='layers'>{''.join(layers)}</div></div>"
        )

    def _paths(self, cells: Iterable[_Cell], height: float, skipped: float) -> str:
        """Draw cells in the colors of the experts, side by side if there are several.

        Args:
            cells: where to draw what.
            height: of an expert's color in its cell.
            skipped: height of the mark of a skipped layer.
        """
        shapes: dict[str, list[str]] = defaultdict(list)
        for layer, index, x, y in cells:
            if not self._routed.processed_LS[layer, index]:
                top = y + (height - skipped) / 2
                shapes["class='skip'"].append(f"M{x} {top:g}h1v{skipped:g}h-1z")
                continue
            numbers = np.flatnonzero(self._taken_LSX[layer, index])
            width = 1 / max(1, len(numbers))
            for place, number in enumerate(numbers):
                left = x + place * width
                shape = f"M{left:.4g} {y}h{width:.4g}v{height:g}h-{width:.4g}z"
                shapes[f"fill='{self._colors[number]}'"].append(shape)
            if not len(numbers):
                shapes["class='no'"].append(f"M{x} {y}h1v{height:g}h-1z")
        return "".join(f"<path {look} d='{''.join(each)}'/>" for look, each in shapes.items())

    def _shares(self, group: GroupRouting) -> str:
        """A table: of a group's tokens, the share that each expert, and no expert, processes."""
        vocabulary = self._mixed.model.vocabulary
        indices = [vocabulary.modalities.index(name) for name in group.modalities]
        own_S = np.isin(vocabulary.modality_of_id[self._routed.ids_S], indices)
        if not own_S.any():
            return ""
        experts = _experts(group, self._routed.groups)
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
        title = f"Experts of {_name(group)}: share of the {own_S.sum()} tokens"
        return (
            f"<h3>{title}</h3><div class='shares'><table><tr><th></th>{head}</tr>"
            f"{''.join(rows)}</table></div>"
        )


def _bar(share: float, look: str) -> str:
    return f"<td {look}>{percent(share)}</td>"


def _name(group: GroupRouting) -> str:
    return " and ".join(group.modalities)


def _experts(group: GroupRouting, groups: Sequence[GroupRouting]) -> list[tuple[str, str]]:
    """Name and color of each expert of a group: different from all that share its modalities."""
    sharing = [each for each in groups if set(each.modalities) & set(group.modalities)]
    counts = [each.taken_LSE.shape[2] for each in sharing]
    own = next(number for number, each in enumerate(sharing) if each is group)
    first, total = sum(counts[:own]), sum(counts)
    prefix = f"{_name(group)} " if len(sharing) > 1 else ""
    return [
        (f"{prefix}expert {expert}", _color(first + expert, total)) for expert in range(counts[own])
    ]


def _color(number: int, total: int) -> str:
    if total <= len(_COLORS):
        return _COLORS[number]
    # Neighbors are far apart on the circle of hues.
    hue = number * 137.5 % 360
    return f"oklch({0.62 + 0.1 * (number % 3):.2f} 0.14 {hue:.0f})"
