"""What clients send: the bodies of requests, checked, and as prompts and settings.

Parameters that would change the answer and are not supported are refused.
"""

import base64
import binascii
import re
import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moma.generate.grammar import Mode
from moma.generate.guidance import Guidance
from moma.generate.sampling import MAX_SEED, Sampling
from moma.generate.settings import Settings
from moma.serve.errors import ApiError

MAX_ANSWERS = 64
# Messages of a request, and parts of a message.
MAX_PARTS = 4096
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

# A text, or the content of an image file.
Part = str | bytes


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _limit_unknown(cls, data: Any) -> Any:
        """Leave one unknown key to complain of: millions would take much time and memory."""
        if not isinstance(data, dict):
            return data
        known = set(cls.model_fields)
        unknown = next((key for key in data if key not in known), None)
        return {key: value for key, value in data.items() if key in known or key == unknown}


class TextPart(_Body):
    """A text."""

    type: Literal["text"]
    text: str


class ImageAddress(_Body):
    """An image as a data URL."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Body):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageAddress


class Message(_Body):
    """A part of the document."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(max_length=MAX_PARTS, fail_fast=True),
        ]
    )

    def parts(self, param: str) -> list[Part]:
        """Return texts and image files, in order.

        Raises:
            ApiError: an image is not a data URL.
        """
        if isinstance(self.content, str):
            return [self.content]
        return [
            part.text
            if isinstance(part, TextPart)
            else _image_file(part.image_url.url, f"{param}.content.{number}.image_url.url")
            for number, part in enumerate(self.content)
        ]


class _SampledBody(_Body):
    """What all requests for answers have in common; for the defaults see `Sampling`."""

    model: str
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    user: str | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None

    def settings(self, **changes: Any) -> list[Settings]:
        """Return the settings of each answer.

        Raises:
            UserError: a value is out of range.
        """
        seed = secrets.randbelow(MAX_SEED + 1) if self.seed is None else self.seed
        given = {name: getattr(self, name, None) for name in _SAMPLING}
        sampling = Sampling(**{name: value for name, value in given.items() if value is not None})
        scales = [self.text_guidance, self.image_guidance]
        guidance = Guidance(*(1.0 if scale is None else scale for scale in scales))
        changes["guidance"] = guidance if any(scale is not None for scale in scales) else None
        return [
            Settings(
                sampling=replace(sampling, seed=(seed + number) % (MAX_SEED + 1)),
                **{name: value for name, value in changes.items() if value is not None},
            )
            for number in range(self.n or 1)
        ]


class StreamOptions(_Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatBody(_SampledBody):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    repetition_penalty: float | None = None
    mode: Mode | None = None
    images: int | None = None
    partial_images: bool = False
    # Values without effect, which some clients always send.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None

    def parts(self) -> list[Part]:
        """Return the texts and image files of all messages, in order.

        Raises:
            ApiError: an image is not a data URL.
        """
        return [
            part
            for number, message in enumerate(self.messages)
            for part in message.parts(f"messages.{number}")
        ]

    def all_settings(self) -> list[Settings]:
        """Return the settings of each answer.

        Raises:
            ApiError: the maximum number of tokens is given twice.
            UserError: a value is out of range.
        """
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens: give one", "max_tokens")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return self.settings(
            mode=self.mode,
            new_tokens=self.max_completion_tokens or self.max_tokens,
            images=self.images,
            stop=stop,
        )


class ImageBody(_SampledBody):
    """The body of `/v1/images/generations`."""

    prompt: str
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None

    def all_settings(self, image_size: int) -> list[Settings]:
        """Return the settings of each image.

        Raises:
            ApiError: the codec has another size.
            UserError: a value is out of range.
        """
        size = f"{image_size}x{image_size}"
        if self.size not in (None, "auto", size):
            raise ApiError(400, f"size: this model draws images of {size}", "size")
        return self.settings(mode="image")


def _image_file(url: str, param: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise ApiError(
            400,
            f"{param}: send the image itself, as data:image/png;base64,…; addresses are not "
            "fetched",
            param,
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"{param}: is not valid base64: {error}", param) from error
