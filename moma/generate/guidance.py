"""Classifier-free guidance of images by the prompt (arXiv 2207.12598; as in Chameleon)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moma.errors import UserError
from moma.generate.stream import Content


@dataclass(frozen=True)
class Guidance:
    """How strongly a prompt guides images, as factors of differences between logits.

    logits = nothing + image · (images − nothing) + text · (prompt − images)

    where `images` are the logits given only the prompt's images, and `nothing` those given nothing.
    A model needs training documents without captions to be guided well.

    Attributes:
        text: scale of the prompt's text; 1 means no guidance.
        image: scale of the prompt's images.

    Raises:
        UserError: a scale is not finite.
    """

    text: float = 3.0
    image: float = 1.2

    def __post_init__(self) -> None:
        for name in ("text", "image"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"guidance: the scale of {name} must be finite")

    def branches(self, prompt: Sequence[Content]) -> list[tuple[list[Content], float]]:
        """Return prompts whose logits are summed, each with its weight; the whole one is first."""
        images: list[Content] = [part for part in prompt if not isinstance(part, str)]
        if not images:
            parts = [(list(prompt), self.text), ([], 1 - self.text)]
        elif len(images) == len(prompt):
            parts = [(images, self.image), ([], 1 - self.image)]
        else:
            parts = [
                (list(prompt), self.text),
                (images, self.image - self.text),
                ([], 1 - self.image),
            ]
        return [parts[0], *((part, weight) for part, weight in parts[1:] if weight)]
