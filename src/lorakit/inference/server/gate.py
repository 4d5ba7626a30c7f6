"""What every request passes before any route sees it: keys, limits, its body, and the counting.

The body is read here, whole, under its limits of size and time, and given on in one piece. So a
request without a key costs nothing, and no route waits for a slow client.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.inference.server.answers import Desk
from lorakit.inference.server.errors import CLIENT_LEFT, ApiError, error_response
from lorakit.inference.server.keys import Keys

ADMIN_ROUTES = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
_ROUTES = ADMIN_ROUTES | {
    "/",
    "/health",
    "/metrics",
    "/openapi.json",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
}
_PARENTS = {"/page/": "/page/{path}", "/v1/models/": "/v1/models/{model}"}
_PAGE = frozenset({"/", "/page/{path}"})
_WITHOUT_KEY = _PAGE | {"/health"}
_ALWAYS = frozenset({"/health", "/metrics"})
_UNCOUNTED = _PAGE | _ALWAYS  # a busy server's page still opens, and says that it is busy
_PASSED_OVER = 4  # so many times the limit is read of a body that is too large
_SECONDS_TO_PASS_OVER = 2.0


class Gate:
    """An ASGI application before another."""

    def __init__(self, app: ASGIApp, desk: Desk, keys: Keys) -> None:
        self._app, self._desk, self._keys = app, desk, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = _route(scope["path"])
        status = CLIENT_LEFT  # unless something is answered

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._admit(scope, route)
            except ApiError as error:
                await error_response(error)(scope, receive, noted)
                return
            self._desk.inside += 1
            try:
                await self._enter(scope, receive, noted)
            finally:
                self._desk.inside -= 1
        except Exception:
            status = 500
            raise
        finally:
            self._desk.metrics.requests.labels(route, str(status)).inc()

    def _admit(self, scope: Scope, route: str) -> None:
        """Whether the request may come in, by its head alone.

        Raises:
            ApiError: 401 or 403 by its key, 429 when there are too many, 503 when the server ends.
        """
        if self._desk.draining and route not in _ALWAYS:
            raise ApiError(503, "the server ends", code="shutdown", retry_after=5)
        if route not in _WITHOUT_KEY:
            self._keys.check(scope["headers"], admin=route in ADMIN_ROUTES)
        limit = self._desk.limits.requests
        if self._desk.inside >= limit and route not in _UNCOUNTED:
            raise ApiError(
                429,
                f"{limit} requests are under way, and no more are taken at once: ask again later",
                code="rate_limit_exceeded",
                retry_after=1,
            )

    async def _enter(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._body(scope, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is None:  # the client has left
            return
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def given_on() -> Message:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, given_on, send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The request's body; None when the client leaves meanwhile.

        Raises:
            ApiError: 400, it is not clear where it ends; 413, it is too large; 408, it does not
                come.
        """
        limit, seconds = self._desk.limits.body_bytes, self._desk.limits.header_seconds
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
                        deadline.reschedule(
                            asyncio.get_running_loop().time() + _SECONDS_TO_PASS_OVER
                        )
                if size > limit:
                    raise too_large
        except TimeoutError as error:
            if size > limit:
                raise too_large from error
            raise ApiError(
                408, f"the body did not come within {seconds:g} s", headers={"Connection": "close"}
            ) from error
        return bytes(body)


def _route(path: str) -> str:
    """The route of a path, as metrics name it; few, whatever paths are asked for."""
    if path in _ROUTES:
        return path
    return next((route for start, route in _PARENTS.items() if path.startswith(start)), "other")
