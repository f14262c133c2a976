"""The HTTP endpoint, in the shapes of OpenAI's API, over an engine."""

import base64
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from moma.errors import UserError
from moma.generate.settings import Settings
from moma.generate.stream import Content, ImagePart, TextPiece, collect
from moma.images import png_bytes, read_image
from moma.serve.answer import Answer
from moma.serve.engine import BusyError, Engine, EngineStoppedError
from moma.serve.errors import ApiError, error_body, error_response, to_api_error
from moma.serve.guard import Guard, read_body
from moma.serve.metrics import CountRequests, Metrics
from moma.serve.reading import merge, reading
from moma.serve.requests import ChatBody, ImageBody, Part

_T = TypeVar("_T", bound=BaseModel)
# Prompts that are decoded and tokenized at a time.
_THREADS = 2


@dataclass(frozen=True)
class Limits:
    """What a request may need.

    Attributes:
        body_bytes: size of its body.
        body_seconds: time until its body has arrived.
        pixels: pixels of each of its images.
        tokens: new tokens of each answer; None: what the context allows.
    """

    body_bytes: int = 16 * 2**20
    body_seconds: float = 60.0
    pixels: int = 16_000_000
    tokens: int | None = None


def create_app(engine: Engine, name: str, limits: Limits, token: str | None = None) -> FastAPI:
    """Return the endpoint of an engine.

    Args:
        engine: a running engine.
        token: what clients have to send; None: the server listens on a loopback address only.
    """
    # The pages that FastAPI makes would load scripts from elsewhere.
    app = FastAPI(title="moma", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(engine)
    endpoint = _Endpoint(engine, name, limits, metrics)
    routes: dict[str, tuple[Callable[..., Any], list[str]]] = {
        "/v1/chat/completions": (endpoint.chat, ["POST"]),
        "/v1/images/generations": (endpoint.images, ["POST"]),
        "/v1/models": (endpoint.models, ["GET"]),
        "/v1/models/{model}": (endpoint.model, ["GET"]),
        "/health": (endpoint.health, ["GET"]),
        "/metrics": (endpoint.metrics, ["GET"]),
    }
    for path, (answer, methods) in routes.items():
        app.add_api_route(path, answer, methods=methods, response_model=None)
    add_error_handlers(app)
    app.add_middleware(Guard, token=token)
    app.add_middleware(CountRequests, metrics=metrics, paths=routes)
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Answer errors in the shape of OpenAI's."""
    kinds = (ApiError, ValidationError, UserError, BusyError, EngineStoppedError, HTTPException)
    for kind in (*kinds, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _answer_error)


async def _answer_error(_: Request, error: Exception) -> Response:
    return error_response(error)


class _Endpoint:
    def __init__(self, engine: Engine, name: str, limits: Limits, metrics: Metrics):
        self._engine, self._name, self._limits, self._metrics = engine, name, limits, metrics
        self._created = int(time.time())
        self._threads = CapacityLimiter(_THREADS)
        self._reading = 0
        mixed = engine.model
        longest = max(map(len, mixed.tokenizer.get_vocab()))
        # A token has at most this many bytes.
        self._max_characters = mixed.context * longest

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`: continue the messages as one document."""
        with self._counted_reading():
            body = await self._read(request, ChatBody)
            answers = await self._submit(body.parts(), body.all_settings(), body.partial_images)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            stream = self._stream(answers, head, usage)
            return _AnswerStream(request, answers, self._metrics.observe, stream)
        contents = await self._contents(request, answers)
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", **_message(content)},
                "finish_reason": answer.end,
                "logprobs": None,
            }
            for number, (answer, content) in enumerate(zip(answers, contents, strict=True))
        ]
        return JSONResponse(
            head
            | {"object": "chat.completion", "model": self._name}
            | {"choices": choices, "usage": _usage(answers)}
        )

    async def images(self, request: Request) -> Response:
        """`/v1/images/generations`: draw images for a prompt."""
        with self._counted_reading():
            body = await self._read(request, ImageBody)
            size = self._engine.model.codec.config.image_size
            answers = await self._submit([body.prompt], body.all_settings(size))
        contents = await self._contents(request, answers)
        images = [part for content in contents for part in content]
        data = [{"b64_json": _base64(part)} for part in images if isinstance(part, Image.Image)]
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": data,
                "size": f"{size}x{size}",
                "output_format": "png",
            }
        )

    async def models(self) -> Response:
        """`/v1/models`: the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, model: str) -> Response:
        """`/v1/models/{model}`."""
        self._require_model(model)
        return JSONResponse(self._model())

    async def health(self) -> Response:
        """`/health`: 200, or 503 if the engine takes no requests."""
        if reason := self._engine.stopped:
            return JSONResponse({"status": "stopped", "reason": reason}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        """`/metrics`, in the text format of Prometheus."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "moma",
        }

    def _require_model(self, name: str) -> None:
        if name != self._name:
            message = f"there is no model of this name; this server has '{self._name}'"
            raise ApiError(404, message, "model", "model_not_found")

    @contextmanager
    def _counted_reading(self) -> Iterator[None]:
        """Count a request that is being read; too many are refused before they take memory."""
        if self._reading >= self._engine.max_active + self._engine.max_queued:
            raise BusyError("too many requests arrive at the same time; try again later")
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    async def _read(self, request: Request, kind: type[_T]) -> _T:
        limits = self._limits
        data = await read_body(request, limits.body_bytes, limits.body_seconds)
        body = await anyio.to_thread.run_sync(kind.model_validate_json, data, limiter=self._threads)
        self._require_model(getattr(body, "model", self._name))
        return body

    async def _submit(
        self, parts: Sequence[Part], settings: Sequence[Settings], has_rows: bool = False
    ) -> list[Answer]:
        """Submit a prompt once for each of several settings."""
        return await anyio.to_thread.run_sync(
            self._submit_now, parts, settings, has_rows, limiter=self._threads
        )

    def _submit_now(
        self, parts: Sequence[Part], settings: Sequence[Settings], has_rows: bool
    ) -> list[Answer]:
        model, limit = self._engine.model, self._engine.max_active + self._engine.max_queued
        if len(settings) > limit:
            raise ApiError(400, f"n: this server takes at most {limit} requests", "n")
        if sum(len(part) for part in parts if isinstance(part, str)) > self._max_characters:
            raise ApiError(400, f"the prompt is longer than the context of {model.context} tokens")
        settings = [self._limited(each) for each in settings]
        return self._engine.submit(parts, settings, has_rows, self._read_image)

    def _read_image(self, file: bytes) -> Image.Image:
        return read_image(file, "messages", "send another", self._limits.pixels)

    def _limited(self, settings: Settings) -> Settings:
        """Settings within the limit of new tokens."""
        limit, wanted = self._limits.tokens, settings.new_tokens
        if limit is None:
            return settings
        if settings.mode == "image":
            needed = settings.images * self._engine.model.model.vocabulary.image_span
            if needed > limit:
                raise ApiError(400, f"images: need {needed} tokens, but this server generates at "
                               f"most {limit} for an answer", "images")  # fmt: skip
        if wanted is not None and wanted > limit:
            message = f"max_tokens: this server generates at most {limit} for an answer"
            raise ApiError(400, message, "max_tokens")
        return replace(settings, new_tokens=wanted or limit)

    async def _contents(self, request: Request, answers: Sequence[Answer]) -> list[list[Content]]:
        async with reading(request, answers, self._metrics.observe):
            contents = [collect([event async for event in answer]) for answer in answers]
        if any(answer.end == "cancelled" for answer in answers):
            if self._engine.stopped:
                raise EngineStoppedError(self._engine.stopped)
            raise ClientDisconnect
        return contents

    async def _stream(
        self, answers: Sequence[Answer], head: dict[str, Any], has_usage: bool
    ) -> AsyncIterator[str]:
        head = head | {"object": "chat.completion.chunk", "model": self._name}

        def chunk(number: int, delta: dict[str, Any], end: str | None = None) -> str:
            choice = {"index": number, "delta": delta, "finish_reason": end, "logprobs": None}
            return sent_event(head | {"choices": [choice]})

        characters = [0] * len(answers)
        try:
            for number in range(len(answers)):
                yield chunk(number, {"role": "assistant", "content": ""})
            async for number, event in merge(answers):
                if isinstance(event, TextPiece):
                    characters[number] += len(event.text)
                    yield chunk(number, {"content": event.text})
                elif isinstance(event, ImagePart):
                    image = await anyio.to_thread.run_sync(_image, event, characters[number])
                    yield chunk(number, {"images": [image]})
                elif (end := answers[number].end) == "cancelled":
                    raise EngineStoppedError("the server is shutting down; try another one")
                else:
                    yield chunk(number, {}, end)
            if has_usage:
                yield sent_event(head | {"choices": [], "usage": _usage(answers)})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield sent_event(error_body(to_api_error(error)))


class _AnswerStream(StreamingResponse):
    """A stream whose answers end with it, however it ends."""

    def __init__(
        self,
        request: Request,
        answers: Sequence[Answer],
        observe: Callable[[Answer], None],
        content: AsyncIterator[str],
    ):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._reading = partial(reading, request, answers, observe)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with self._reading():
            await super().__call__(scope, receive, send)


def sent_event(data: dict[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(data)}\n\n"


def _message(content: Sequence[Content]) -> dict[str, Any]:
    """Text and images of an answer; `text_offset` says where in the text an image is."""
    text, images = "", list[dict[str, Any]]()
    for part in content:
        if isinstance(part, str):
            text += part
        else:
            images.append(_image(ImagePart(part, True), len(text)))
    return {"content": text, **({"images": images} if images else {})}


def _image(part: ImagePart, text_offset: int) -> dict[str, Any]:
    url = f"data:image/png;base64,{_base64(part.image)}"
    image = {"type": "image_url", "image_url": {"url": url}, "text_offset": text_offset}
    return image if part.is_complete else image | {"partial": True}


def _base64(image: Image.Image) -> str:
    return base64.b64encode(png_bytes(image)).decode()


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt, new = answers[0].prompt_tokens, sum(answer.new_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
