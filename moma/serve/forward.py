"""A server before replicas that answers in the shape of OpenAI's API when one of them is lost."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from moma.serve.app import Limits, add_error_handlers, sent_event
from moma.serve.errors import ApiError, error_body
from moma.serve.guard import Guard, read_body
from moma.serve.reading import until_disconnected

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
# A request that ends its process must not go on to end the others.
_ATTEMPTS = 2
# Of a connection, not of a request; nothing is compressed.
_OWN_HEADERS = (
    "accept-encoding",
    "connection",
    "content-length",
    "keep-alive",
    "transfer-encoding",
)


def forwarding_app(
    url: str, limits: Limits, token: str | None = None, pause: float = 0.5
) -> FastAPI:
    """An app that passes requests on, and sends one again that is lost before its answer begins.

    It is sent again once only.

    Args:
        url: of the server behind it, which chooses a replica for each request.
        token: what clients have to send; None: the server listens on a loopback address only.
        pause: seconds before a request is sent again.
    """
    # Not through a proxy that the environment names: requests have tokens.
    client = httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(), trust_env=False)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    async def forward(request: Request) -> Response:
        body = b""
        if request.method == "POST":
            body = await read_body(request, limits.body_bytes, limits.body_seconds)
        return await _unless_hung_up(request, _forward(client, request, body, pause))

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_api_route("/{path:path}", forward, methods=["GET", "POST"], response_model=None)
    add_error_handlers(app)
    app.add_middleware(Guard, token=token)
    return app


async def _forward(
    client: httpx.AsyncClient, request: Request, body: bytes, pause: float
) -> Response:
    """Send a request until it is answered; raises `ApiError` if no replica answers it."""
    try:
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
    except httpx.InvalidURL as error:
        raise ApiError(404, "there is no such path") from error
    headers = [(name, value) for name, value in request.headers.items() if _is_passed(name)]
    for attempt in range(_ATTEMPTS):
        if attempt:
            await asyncio.sleep(pause)
        sent = client.build_request(request.method, url, headers=headers, content=body)
        try:
            answer = await client.send(sent, stream=True)
            kind = answer.headers.get("content-type", "")
            if kind.startswith("text/event-stream"):
                return _ForwardedStream(answer)
            content = await answer.aread()
        except httpx.TransportError as error:
            logger.warning("a request is lost: %r", error)
            continue
        # Errors of our own are JSON.
        if answer.status_code < 500 or kind.startswith("application/json"):
            return Response(content, answer.status_code, _passed(answer))
        logger.warning("a request is lost: status %d", answer.status_code)
    raise _lost()


class _ForwardedStream(StreamingResponse):
    """The events of a replica, which ends them even if the client is gone before the first."""

    def __init__(self, answer: httpx.Response):
        super().__init__(_events(answer), answer.status_code, _passed(answer))
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


async def _events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The events of a stream, the last an error if its replica is lost."""
    try:
        async for part in answer.aiter_raw():
            yield part
    except httpx.TransportError as error:
        logger.warning("a stream is lost: %r", error)
        yield sent_event(error_body(_lost())).encode()


def _lost() -> ApiError:
    return ApiError(503, "the replica that answered is lost; try again", code="replica_lost")


async def _unless_hung_up(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Do work for a client, or end it when the client disconnects."""
    working = asyncio.create_task(work)
    hung_up = asyncio.create_task(until_disconnected(request))
    try:
        await asyncio.wait([working, hung_up], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        hung_up.cancel()


def _is_passed(name: str) -> bool:
    return name.lower() not in _OWN_HEADERS


def _passed(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if _is_passed(name)}
