"""Errors of the HTTP endpoint, in the shape of OpenAI's."""

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from moma.errors import UserError, shorten
from moma.serve.engine import BusyError, EngineStoppedError

# The status that nginx logs for a client that has hung up.
HUNG_UP = 499
_RETRY_SECONDS = "1"
# The body of the request may not have been read.
_UNREAD = (401, 403, 404, 405, 408, 413, 415, 429)


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        param: the parameter that is wrong; None: none.
        code: a word for programs; None: none.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def to_api_error(error: Exception) -> ApiError:
    """Return the error to send to a client; details of internal errors stay in the log."""
    match error:
        case ApiError():
            return error
        case ValidationError():
            return _of_validation(error)
        case UserError():
            return ApiError(400, str(error))
        case BusyError():
            return ApiError(429, str(error), code="queue_full")
        case EngineStoppedError():
            return ApiError(503, str(error), code="engine_stopped")
        case ClientDisconnect():
            return ApiError(HUNG_UP, "the client has hung up")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail))
    return ApiError(500, "the request failed; the server's log says why")


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON object of an error."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": str(error),
            "type": kinds.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: Exception) -> JSONResponse:
    """The response to a request that fails with an error."""
    found = to_api_error(error)
    headers = {"Retry-After": _RETRY_SECONDS} if found.status in (429, 503) else {}
    if found.status in _UNREAD:
        headers["Connection"] = "close"
    if found.status == 401:  # browsers ask for a password, which is the token
        headers["WWW-Authenticate"] = 'Basic realm="moma", charset="UTF-8"'
    return JSONResponse(error_body(found), found.status, headers)


def _of_validation(error: ValidationError) -> ApiError:
    # Of the kinds of content that are allowed, the one that fits best says what is wrong.
    errors = error.errors(include_url=False, include_input=False)
    first = max(errors, key=lambda each: (len(each["loc"]), each["type"] != "string_type"))
    param = _path(first["loc"], first["type"])
    message = shorten(first["msg"].removeprefix("Value error, "), 300)
    if first["type"] == "extra_forbidden":
        message = "unknown parameter"
    elif first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {message}")
    return ApiError(400, f"{param}: {message}" if param else message, param or None)


def _path(location: Sequence[int | str], kind: str) -> str:
    """A location without the types that `pydantic` names in it."""
    keys = list(location)
    if kind.startswith("string_") and keys[-1:] == ["str"]:  # a text or a list was expected
        del keys[-1]
    for number in reversed(range(len(keys))):
        if "[" in str(keys[number]):
            # An item's number follows, and then its type.
            del keys[number + 2 : number + 3]
            del keys[number]
    return shorten(".".join(map(str, keys)), 100)
