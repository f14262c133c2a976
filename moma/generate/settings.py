"""How prompts are continued: what a person may set, on the command line, a page or over HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from moma.errors import UserError, list_names, quote
from moma.generate.grammar import Mode
from moma.generate.guidance import Guidance
from moma.generate.sampling import Sampling


@dataclass(frozen=True)
class Settings:
    """How prompts are continued.

    Attributes:
        mode: `text`, `image` or `mixed`; without a codec, `mixed` means `text`.
        sampling: how text is sampled (defaults: Chameleon's). Of several prompts, number i has the
            seed + i.
        new_tokens: maximum number of tokens of a continuation; None: what the context allows.
        image_sampling: how image codes are sampled, whatever its seed; None: like text, without
            its repetition penalty.
        images: number of images that the mode `image` generates.
        guidance: guidance of images by the prompt, for the mode `image`; None: none.
        stop: strings that end a text; they are left out.
        drafts: number of image codes that a pass checks besides sampling one; None: 8 while a
            single answer is generated without guidance, and not by a model with routers on a CPU,
            else 0. The result does not depend on it.

    Raises:
        UserError: a value is out of range, or has no effect in this mode.
    """

    mode: Mode = "mixed"
    sampling: Sampling = field(default_factory=Sampling)
    new_tokens: int | None = None
    image_sampling: Sampling | None = None
    images: int = 1
    guidance: Guidance | None = None
    stop: Sequence[str] = ()
    drafts: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UserError(f"mode {quote(str(self.mode))}: use {list_names(get_args(Mode))}")
        for name, least in (("new_tokens", 1), ("images", 1), ("drafts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} {value}: must be at least {least}")
        if not all(self.stop):
            raise UserError("stop: an empty string would end every answer; leave it out")
        if self.mode == "image":
            if self.stop:
                raise UserError("stop: no effect with mode 'image', which writes no text")
        elif self.guidance is not None:
            raise UserError(
                f"guidance applies to images only; use it with mode 'image', not '{self.mode}'"
            )
        elif self.images != 1:
            raise UserError(
                f"images {self.images}: no effect with mode '{self.mode}'; it needs mode 'image'"
            )

    @property
    def code_sampling(self) -> Sampling:
        """How image codes are sampled."""
        return self.image_sampling or replace(self.sampling, repetition_penalty=1.0)
