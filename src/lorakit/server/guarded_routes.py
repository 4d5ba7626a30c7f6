"""Routes that declare who may use them, and a guard that lets a request in by what was matched.

The route that the router chose is the only reading of a request's path: keys are never decided by
comparing paths. A route that declares nothing cannot be added to the application.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable
from enum import IntEnum
from typing import Any, SupportsIndex

from fastapi import Depends, FastAPI, Request, Security
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from lorakit.server.bodies import StrictRequest, read_body
from lorakit.server.errors import ApiError
from lorakit.server.keys import Keys
from lorakit.server.open_answers import Desk


class Level(IntEnum):
    """What a request must bring."""

    ANYONE = 0
    API_KEY = 1
    ADMIN_KEY = 2


_SCHEMES = {
    Level.API_KEY: HTTPBearer(auto_error=False, scheme_name="API key"),
    Level.ADMIN_KEY: HTTPBearer(auto_error=False, scheme_name="Admin key"),
}


class Access:
    """Who may use a route, as one of its dependencies.

    Calling it does nothing: FastAPI calls dependencies after it has read the body, so the route
    looks at it before that.

    Args:
        when_busy: answered too when as many requests are under way as are taken.
        when_ending: answered too while the server ends.
    """

    def __init__(self, level: Level, when_busy: bool, when_ending: bool) -> None:
        self.level, self.when_busy, self.when_ending = level, when_busy, when_ending

    def __call__(self) -> None:
        pass


def needs(level: Level, *, when_busy: bool = False, when_ending: bool = False) -> list[Any]:
    """The `dependencies` of a route that is for `level`, with what its description says of keys."""
    scheme = _SCHEMES.get(level)
    declared = Depends(Access(level, when_busy, when_ending))
    return [declared] if scheme is None else [declared, Security(scheme)]


class Guard:
    """Lets requests in to what they matched.

    Args:
        desk: knows the limits, and what is under way.
    """

    def __init__(self, desk: Desk, keys: Keys) -> None:
        self._desk, self._keys = desk, keys

    def admit(self, scope: Scope, access: Access) -> None:
        """Whether a request may come in, by its head alone.

        Raises:
            ApiError: 401 or 403 by its key, 429 when there are too many, 503 when the server ends.
        """
        desk = self._desk
        if desk.draining and not access.when_ending:
            raise ApiError(503, "the server ends", code="shutdown", retry_after=5)
        if access.level is not Level.ANYONE:
            self._keys.check(scope["headers"], admin=access.level is Level.ADMIN_KEY)
        limit = desk.limits.requests
        if desk.busy >= limit and not access.when_busy:
            raise ApiError(
                429,
                f"{limit} requests are under way, and no more are taken at once: ask again later",
                code="rate_limit_exceeded",
                retry_after=1,
            )

    async def enter(
        self,
        access: Access,
        handle: Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Passes a request with its whole body to `handle`, if it may come in.

        Raises:
            ApiError: it may not, or its body cannot be taken.
        """
        self.admit(scope, access)
        desk = self._desk
        held = min(int(dict(scope["headers"]).get(b"content-length", 0)), desk.limits.body_bytes)
        self._require_memory(held)
        counts = not access.when_busy
        desk.inside += 1
        desk.busy += counts
        desk.body_bytes += held
        try:
            body = await read_body(scope, receive, desk.limits)
            if body is None:  # the client has left
                return
            self._require_memory(len(body) - held)  # where its length was not told before
            desk.body_bytes += len(body) - held
            held = len(body)
            waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def given_on() -> Message:
                return waiting.pop() if waiting else await receive()

            await handle(scope, given_on, send)
        finally:
            desk.inside -= 1
            desk.busy -= counts
            desk.body_bytes -= held

    def _require_memory(self, size: int) -> None:
        """Raises ApiError, 429, where bodies under way would take too much memory with this one."""
        if self._desk.body_bytes + size > self._desk.limits.bodies_bytes:
            raise ApiError(
                429,
                "the requests under way take all memory that there is for them: ask again later",
                code="rate_limit_exceeded",
                retry_after=1,
            )

    async def nowhere(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What a request gets that matches no route: 404, and only with the API key.

        Raises:
            ApiError, HTTPException: always.
        """
        self.admit(scope, Access(Level.API_KEY, when_busy=False, when_ending=False))
        raise HTTPException(404)


class GuardedRoute(APIRoute):
    """A route that is entered through the application's guard.

    Raises:
        TypeError: its dependencies do not declare once who may use it, with `needs`.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        found = [each.dependency for each in self.dependencies]
        declared = [each for each in found if isinstance(each, Access)]
        if len(declared) != 1:
            raise TypeError(f"the route {path} must declare once who may use it: see needs()")
        (self.access,) = declared
        # Starlette's pattern ends in $, which matches before a last newline too.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        guard: Guard = scope["app"].state.guard
        await guard.enter(self.access, super().handle, scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strictly


class _GuardedRoutes(list[BaseRoute]):
    """A list that only guarded routes can be added to."""

    def append(self, route: BaseRoute) -> None:
        super().append(_guarded(route))

    def insert(self, index: SupportsIndex, route: BaseRoute) -> None:
        super().insert(index, _guarded(route))

    def extend(self, routes: Iterable[BaseRoute]) -> None:
        super().extend(map(_guarded, routes))


def _guarded(route: BaseRoute) -> BaseRoute:
    if not isinstance(route, GuardedRoute):
        raise TypeError(f"{route} does not declare who may use it: add it as a GuardedRoute")
    return route


def install(app: FastAPI, guard: Guard) -> None:
    """Has `app` take guarded routes alone, and answer no other path."""
    if app.router.routes:
        raise TypeError("the application has routes that nothing guards")
    app.state.guard = guard
    app.router.route_class = GuardedRoute
    app.router.routes = _GuardedRoutes()
    app.router.default = guard.nowhere
