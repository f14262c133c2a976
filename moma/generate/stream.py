"""Text and images from tokens as they come."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from moma.vocabulary import Vocabulary

Content = str | Image.Image
# Tokens before the newest ones that affect how these are decoded.
_CONTEXT = 8


class TextPiece(NamedTuple):
    """The next piece of a text."""

    text: str


class ImagePart(NamedTuple):
    """The image as far as it is complete: all of it, or its upper rows."""

    image: Image.Image
    is_complete: bool


Event = TextPiece | ImagePart


class StopStrings:
    """Whether the end of a text contains one of several strings.

    Args:
        strings: what ends a text, each not empty.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: Vocabulary, strings: Sequence[str]):
        self._tokenizer, self._vocabulary, self._strings = tokenizer, vocabulary, strings
        # A character has at most four bytes, and a token at least one.
        self._tail = 4 * max(map(len, strings), default=0) + 4

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether one of the strings is at the end of the text of these tokens."""
        tail = [token for token in tokens[-self._tail :] if self._vocabulary.code_of_id[token] < 0]
        text = self._tokenizer.decode(tail)
        return any(string in text for string in self._strings)


class ContentStream:
    """Turns the tokens of a sequence into pieces of text and images.

    Args:
        draw: returns the image of [codes_per_image] codes.
        stops: strings that end a text; they and what follows are left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        draw: Callable[[np.ndarray], Image.Image],
        stops: Sequence[str] = (),
    ):
        self._tokenizer, self._vocabulary, self._draw = tokenizer, vocabulary, draw
        self._stops = stops
        self._ids: list[int] = []
        self._codes: list[int] = []
        self._shown = 0

    def add(self, tokens: Iterable[int], has_rows: bool = False) -> list[Event]:
        """Return what the next tokens complete.

        Args:
            has_rows: whether the upper rows of an unfinished image are returned as well.
        """
        vocabulary, events, before = self._vocabulary, [], len(self._codes)
        for token in tokens:
            code = vocabulary.code_of_id[token]
            if code >= 0:
                self._codes.append(code)
            elif token in (vocabulary.begin_image, vocabulary.end):
                events += self.finish()
            elif token == vocabulary.end_image:
                if len(self._codes) == vocabulary.codes_per_image:
                    events.append(ImagePart(self._draw(np.array(self._codes)), True))
            elif token not in (vocabulary.beginning, vocabulary.padding):
                self._ids.append(token)
            if token in (vocabulary.begin_image, vocabulary.end_image):
                self._codes, before = [], 0
        return [*events, *self._new_text(), *(self._new_rows(before) if has_rows else [])]

    def finish(self) -> list[Event]:
        """Return the rest of a text that has ended."""
        events = self._new_text(is_final=True)
        self._ids, self._shown = [], 0
        return events

    def _new_text(self, is_final: bool = False) -> list[Event]:
        if not self._ids:
            return []
        text = self._tokenizer.decode(self._ids)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        end = min(found) if found else len(text)
        if not found and not is_final:
            # What may be part of a character, or of a stop string, is kept back.
            end = len(text.rstrip("\ufffd"))
            end -= max((_overlap(text[:end], stop) for stop in self._stops), default=0)
        piece, self._shown = text[self._shown : end], max(self._shown, end)
        if end == len(text) and len(self._ids) > 8 * _CONTEXT:
            # Decoding all of a long text for every token would take quadratic time.
            self._ids = self._ids[-_CONTEXT:]
            self._shown = len(self._tokenizer.decode(self._ids))
        return [TextPiece(piece)] if piece else []

    def _new_rows(self, before: int) -> list[Event]:
        side = round(self._vocabulary.codes_per_image**0.5)
        rows = len(self._codes) // side
        if rows in (0, before // side):
            return []
        codes = np.full(self._vocabulary.codes_per_image, self._codes[-1])
        codes[: len(self._codes)] = self._codes
        image = self._draw(codes)
        return [ImagePart(image.crop((0, 0, image.width, image.height * rows // side)), False)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that is a beginning of a stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def collect(events: Iterable[Event]) -> list[Content]:
    """Join the pieces of texts, and leave out unfinished images."""
    content: list[Content] = []
    for event in events:
        if isinstance(event, ImagePart):
            content += [event.image] if event.is_complete else []
        elif content and isinstance(content[-1], str):
            content[-1] += event.text
        else:
            content.append(event.text)
    return content
