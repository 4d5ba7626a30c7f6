"""What every request passes: whether the server answers to its names.

A browser on this machine reaches a server on a loopback address, and a page from anywhere runs in
it. By DNS rebinding such a page gives its own name the address 127.0.0.1: the name in `Host` tells.
Without that it can still send, but not read: `Sec-Fetch-Site` and `Origin` tell, which no page can
forge. Neither matters where a key is asked for, as the page does not have it. Which key a request
needs is its route's to say (`guarded_routes.py`), what keys there are `keys.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.server.errors import CLIENT_LEFT, ApiError, error_response
from lorakit.server.options import is_loopback
from lorakit.server.prometheus import Metrics

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN = frozenset({"same-origin", "none"})  # none: typed by the user


class Hosts:
    """The names of one server.

    Args:
        listens_on: the address; a loopback one answers to loopback names, others to any name.
        allowed: further names, without ports; with some, other addresses answer to these alone.
        has_key: whether requests must bring a key.
    """

    def __init__(self, listens_on: str, allowed: Sequence[str], has_key: bool) -> None:
        self._allowed = frozenset(name.lower() for name in allowed)
        self._any_name = not is_loopback(listens_on) and not allowed
        self._has_key = has_key

    def check(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Lets a request with these headers pass.

        Raises:
            ApiError: 403, it asks for another name, or another site's page sends it.
        """
        head = {name: value.decode("latin-1") for name, value in headers}
        host = head.get(b"host")  # without one, as HTTP/1.0 has it, no browser has sent it
        if not self._any_name and host is not None and not self._is_ours(_name(host)):
            name = ascii(_name(host) or host[:100])
            raise ApiError(
                403,
                f"this server does not answer to the name {name}, but to localhost, 127.0.0.1 and "
                "[::1]: if the name is yours, start lorakit serve with --allowed-host",
                code="host_not_allowed",
            )
        if not self._has_key and method not in _SAFE and not self._from_own_page(head, host):
            raise ApiError(
                403,
                "a web page of another origin cannot use a server without a key: start lorakit "
                "serve with --api-key, or with --allowed-host and the page's host name",
                code="origin_not_allowed",
            )

    def _is_ours(self, name: str) -> bool:
        return is_loopback(name) or name in self._allowed

    def _from_own_page(self, head: dict[bytes, str], host: str | None) -> bool:
        site, origin = head.get(b"sec-fetch-site"), head.get(b"origin")
        if origin is not None and _name_of_origin(origin) in self._allowed:
            return True
        if site is not None:
            return site in _OWN
        # An older browser, or no browser at all.
        return origin is None or origin.partition("://")[2].lower() == (host or "").lower() != ""


def _name(host: str) -> str:
    """The name in a `Host` header, without port, brackets and the dot of the root; "" of none."""
    try:
        parts = urlsplit(f"//{host}")
        if parts.netloc != host or "@" in host:
            return ""
        _ = parts.port  # raises ValueError where it is not a number
        return (parts.hostname or "").removesuffix(".")
    except ValueError:
        return ""


def _name_of_origin(origin: str) -> str:
    try:
        return _name(urlsplit(origin).netloc)
    except ValueError:
        return ""


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
