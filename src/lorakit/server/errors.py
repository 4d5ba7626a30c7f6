"""Errors as OpenAI's clients expect them: a status and `{"error": {message, type, param, code}}`.

Whatever goes wrong below an application made here is turned into that form, also what FastAPI and
Starlette raise themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from lorakit.engine.pool import UnknownModelError
from lorakit.errors import InputError, LorakitError, one_line

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
UNKNOWN_FIELD = "unknown_field"
"""pydantic's type of the error for a field that no payload has; its context has the `name`."""

CLIENT_LEFT = 499
"""The status, for the figures alone, of what nobody waits for any more."""

_SHOWN = 1000


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: one line that says what to do.
        code: a word for programs, OpenAI's where it has one.
        param: the field of the request that is at fault.
        retry_after: seconds after which it is worth while to ask again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        more = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, one_line(message)[:_SHOWN], headers={**(headers or {}), **more})
        self.code, self.param = code, param


def error_content(
    status: int, message: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: StarletteHTTPException) -> JSONResponse:
    """An error as a response."""
    code, param = getattr(error, "code", None), getattr(error, "param", None)
    content = error_content(error.status_code, str(error.detail), code, param)
    return JSONResponse(content, error.status_code, error.headers)


def bad_field(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400, for a field of the request."""
    return ApiError(400, message, code=code, param=param)


def no_model(error: InputError) -> ApiError:
    """404, for a model that is not there."""
    return ApiError(404, str(error), code="model_not_found", param="model")


def install(app: FastAPI) -> None:
    """Has `app` answer every error in OpenAI's form."""

    @app.exception_handler(StarletteHTTPException)
    async def known(request: Request, error: StarletteHTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):  # of Starlette's routing
            where = f"{request.method} {request.url.path}"[:200]
            words = {404: f"there is no {where}", 405: f"there is no {where}: see the Allow header"}
            detail = words.get(error.status_code, str(error.detail))
            error = ApiError(error.status_code, detail, headers=error.headers)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_of_validation(error))

    @app.exception_handler(
        UnknownModelError
    )  # also where an adapter was unloaded since it was looked up
    async def unknown(_: Request, error: UnknownModelError) -> JSONResponse:
        return error_response(no_model(error))

    @app.exception_handler(InputError)
    async def refused(_: Request, error: InputError) -> JSONResponse:
        return error_response(bad_field(str(error)))

    @app.exception_handler(LorakitError)
    async def failed(_: Request, error: LorakitError) -> JSONResponse:
        return error_response(ApiError(503, str(error)))

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        message = f"{type(error).__name__} (unexpected: the server's log has the traceback)"
        return error_response(ApiError(500, message))


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first field that pydantic found wrong, in one line."""
    if isinstance(error.body, bytes) or error.body is None:
        return bad_field("give a JSON object as the body, with content-type: application/json")
    places = [_place(found["loc"][1:], error.body) for found in error.errors()]
    # A value may be one of several things, and fails to be each: the furthest came the closest.
    of_field = [i for i, place in enumerate(places) if place[:1] == places[0][:1]]
    closest = max(of_field, key=lambda i: len(places[i]))
    found, place = error.errors()[closest], places[closest]
    kind, message, given = found["type"], str(found["msg"]), found.get("ctx", {})
    if kind == "missing":
        place.append(found["loc"][-1])
    elif kind == UNKNOWN_FIELD:
        place.append(given["name"])
    param = in_words(place)
    where = param or "the body"
    if kind == "missing":
        return bad_field(f"{where} is missing", param, "missing_required_parameter")
    if kind == UNKNOWN_FIELD:
        return bad_field(f"{where} {message}", param, "unknown_parameter")
    if kind == "none_required" or (kind == "too_long" and given.get("max_length") == 0):
        return bad_field(f"{where} is not supported: leave it out", param, "unsupported_parameter")
    if kind in ("literal_error", "union_tag_invalid"):
        wanted = given["expected" if kind == "literal_error" else "expected_tags"]
        message = f"only {wanted} is supported"
        return bad_field(f"{where}: {message}", param, "unsupported_value")
    if kind == "value_error":  # our own words
        message = message.removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return bad_field(f"{where}: {message}", param or None, "invalid_value")


def in_words(place: Sequence[str | int]) -> str:
    """A place in a body as OpenAI writes it: `messages[2].content`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return "".join(steps)[1:][:_SHOWN]


def _place(location: Sequence[Any], body: Any) -> list[str | int]:
    """Where in `body` pydantic's location lies, without its words for the members of a union."""
    place: list[str | int] = []
    value = body
    for step in location:
        if (isinstance(value, dict) and step in value) or (
            isinstance(value, list) and isinstance(step, int) and step < len(value)
        ):
            place.append(step)
            value = value[step]
    return place
