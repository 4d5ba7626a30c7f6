"""What every request passes before it is routed: whether its names are this server's. And counting.

Which key it needs is its route's to say (`guarded_routes.py`).
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.server.errors import CLIENT_LEFT, ApiError, error_response
from lorakit.server.hosts import Hosts
from lorakit.server.metrics import Metrics


class Gate:
    """An ASGI application before another."""

    def __init__(self, app: ASGIApp, hosts: Hosts, metrics: Metrics) -> None:
        self._app, self._hosts, self._metrics = app, hosts, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT  # unless something is answered

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._hosts.check(scope["method"], scope["headers"])
            except ApiError as error:
                await error_response(error)(scope, receive, noted)
                return
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            # The matched route's, so there are few, whatever paths are asked for.
            route = getattr(scope.get("route"), "path_format", "other")
            self._metrics.requests.labels(route, str(status)).inc()
