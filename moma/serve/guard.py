"""Who may use the server, and how much it reads."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import os
import re
from pathlib import Path

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from moma.errors import UserError
from moma.serve.errors import ApiError, error_response

_OPEN_PATHS = ("/health",)
_TOKEN = "MOMA_TOKEN"
_MIN_TOKEN = 16
# An address of IPv6 in brackets, or a name or another address; then a port, perhaps.
_HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?")


class Guard:
    """Lets requests pass that have the token, or, without one, that name a loopback address.

    The token is expected as `Authorization: Bearer TOKEN`, or as the password of a browser.
    Without a token, a web page elsewhere could otherwise reach the server through a name of its own
    that resolves to this machine.
    """

    def __init__(self, app: ASGIApp, token: str | None):
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse a request."""
        if scope["type"] in ("http", "websocket") and scope["path"] not in _OPEN_PATHS:
            headers = Headers(scope=scope)
            if refused := self._refusal(headers):
                await error_response(refused)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._token is None:
            host = _HOST.fullmatch(headers.get("host", ""))
            if host and is_loopback(host[1] or host[2] or ""):
                return None
            return ApiError(403, "without a token, the server answers to a loopback address only")
        given = _given_token(headers.get("authorization", ""))
        if given is not None and hmac.compare_digest(given.encode(), self._token.encode()):
            return None
        return ApiError(401, "the token is missing or wrong", code="invalid_api_key")


def read_token(file: Path | None, host: str) -> str | None:
    """Return the token of a file, or of the environment; None: there is none.

    Raises:
        UserError: it is too short, or there is none and the host is not a loopback address.
    """
    if file is None:
        token, where = os.environ.get(_TOKEN), _TOKEN
    else:
        try:
            token, where = file.read_text(encoding="utf-8").strip(), f"--token-file {file}"
        except UnicodeDecodeError as error:
            raise UserError(f"--token-file {file}: is not text; write a token into it") from error
    if token is None:
        if not is_loopback(host):
            raise UserError(
                f"--host {host}: others may reach this address; give --token-file or set {_TOKEN}"
            )
    elif len(token) < _MIN_TOKEN or not (token.isascii() and token.isprintable()):
        raise UserError(
            f"{where}: a token has at least {_MIN_TOKEN} ASCII characters, on one line, for "
            "example from: openssl rand -hex 16"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether a name or address means only this machine."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """Read the JSON body of a request, without reading more than `max_bytes`.

    Raises:
        ApiError: it is too large, too slow or of another type.
        starlette.requests.ClientDisconnect: the client has hung up.
    """
    # Pages of other servers cannot send this type without being asked first.
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the body as Content-Type: application/json")
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s") from error
    return bytes(body)


def _given_token(authorization: str) -> str | None:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None
