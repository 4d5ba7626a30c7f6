"""Bodies of requests: read whole under limits of size and time, and JSON by the letter."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from fastapi import Request
from starlette.types import Receive, Scope

from lorakit.data import strict_json
from lorakit.server.errors import ApiError, bad_field
from lorakit.server.fair_turns import Turns
from lorakit.server.options import Limits

_PASSED_OVER = 4  # so many times the limit is read of a body that is too large
_SECONDS_TO_PASS_OVER = 2.0
_SMALL = 64 * 1024

MAX_OBJECTS = 16384
"""In a body, and as many lists: messages, parts, calls, tools, and what is nested in them."""


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes | None:
    """The request's body; None when the client leaves meanwhile.

    Raises:
        ApiError: 400, it is not clear where it ends; 413, it is too large; 408, it does not
            come.
    """
    limit, seconds = limits.body_bytes, limits.header_seconds
    head = dict(scope["headers"])
    if b"content-length" in head and b"transfer-encoding" in head:
        # A proxy may go by the other, and take the rest for a request (RFC 9112, 6.1).
        raise ApiError(
            400,
            "give the body's Content-Length or Transfer-Encoding, not both",
            headers={"Connection": "close"},
        )
    length = head.get(b"content-length", b"0")
    too_large = ApiError(
        413,
        f"the body is larger than the {limit} bytes that are taken",
        code="request_too_large",
        headers={"Connection": "close"},
    )
    body = bytearray()
    try:
        async with asyncio.timeout(seconds) as deadline:
            if int(length) > limit * _PASSED_OVER:
                raise too_large
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size += len(chunk)
                if size <= limit:
                    body += chunk
                elif size > limit * _PASSED_OVER:
                    raise too_large
                elif body:
                    # A client that is still sending does not read: what it sends is passed
                    # over for a while, so that it gets to know why it is refused.
                    body.clear()
                    deadline.reschedule(asyncio.get_running_loop().time() + _SECONDS_TO_PASS_OVER)
            if size > limit:
                raise too_large
    except TimeoutError as error:
        if size > limit:
            raise too_large from error
        raise ApiError(
            408, f"the body did not come within {seconds:g} s", headers={"Connection": "close"}
        ) from error
    return bytes(body)


def client_of(request: Request) -> str:
    """Who asks, as far as a fair order goes: an address."""
    return request.client.host if request.client else ""


class StrictRequest(Request):
    """A request whose JSON is read by the letter, beside the event loop if there is much of it."""

    async def json(self) -> Any:
        """The body, if it is JSON by the letter and all of its text can be written as UTF-8.

        Raises:
            ApiError: 400, it is not, or it has too many objects.
        """
        body = await self.body()
        if len(body) <= _SMALL:
            return _parsed(body)
        turns: Turns = self.scope["app"].state.turns
        return await turns.run(partial(_parsed, body), len(body), client_of(self))


def _parsed(body: bytes) -> Any:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise bad_field(f"the body is not UTF-8 (byte {error.start})") from error
    try:
        # Each is checked in the event loop, where that holds everyone up.
        value = strict_json.parse(text, MAX_OBJECTS)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise bad_field("the body has half a character (a lone surrogate, \\ud800)") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise bad_field(f"the body is not JSON: {error.msg} ({where})") from error
    except ValueError as error:
        raise bad_field(f"the JSON of the body cannot be taken: {error}") from error
    return value
