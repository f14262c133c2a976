"""Prompts and answers of the page: the order of text and images, and HTML."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from moma.errors import UserError
from moma.generate.stream import Event, ImagePart, TextPiece
from moma.images import png_bytes
from moma.study.page import data_url

_T = TypeVar("_T")
# Of the page, below the address of the endpoint.
PATH = "/page"
# Where an image stands in a text.
MARK = "<image>"
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def arrange(text: str, images: Sequence[_T]) -> list[str | _T]:
    """Put images, or their files, where a text has `MARK`; those for which it has none come first.

    Raises:
        UserError: there are fewer images than marks, or there is nothing at all.
    """
    texts = text.split(MARK)
    first = len(images) - (len(texts) - 1)
    if first < 0:
        raise UserError(
            f"the text has {MARK} {len(texts) - 1} times, but there are {len(images)} images"
        )
    content: list[str | _T] = [*images[:first], texts[0]]
    for image, following in zip(images[first:], texts[1:], strict=True):
        content += [image, following]
    if not any(content):
        raise UserError("write a text, or drop an image")
    return [part for part in content if part != ""]


def answer_html(events: Sequence[Event], status: str = "") -> str:
    """Text and images of an answer so far, in their order; of an unfinished image the newest rows.

    Args:
        status: a line below.
    """
    parts: list[str] = []
    for number, event in enumerate(events):
        if isinstance(event, TextPiece):
            parts.append(html.escape(event.text))
        elif event.is_complete or number == len(events) - 1:
            parts.append(_image(event))
    body = "".join(parts) or "<span class='empty'>The answer appears here.</span>"
    return f"<div class='answer'>{body}</div><div class='about'>{html.escape(status)}</div>"


def _image(part: ImagePart) -> str:
    width, height = part.image.size
    url = data_url(png_bytes(part.image))
    kind = "complete" if part.is_complete else "growing"
    return (
        f"<span class='frame'><img class='{kind}' alt='image' src='{url}' "
        f"style='aspect-ratio:{width}/{height}'></span>"
    )
