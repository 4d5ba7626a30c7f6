"""What every request passes: whether the server answers to its names, and which key it brings.

A browser on this machine reaches a server on a loopback address, and a page from anywhere runs in
it. By DNS rebinding such a page gives its own name the address 127.0.0.1: the name in `Host` tells.
Without that it can still send, but not read: `Sec-Fetch-Site` and `Origin` tell, which no page can
forge. Neither matters where a key is asked for, as the page does not have it. Which key a request
needs is its route's to say (`guarded_routes.py`).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from hashlib import sha256
from urllib.parse import urlsplit

from starlette.requests import Request
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


class Keys:
    """The server's keys, as requests bring them (`key_of`), compared in constant time.

    Args:
        api_key: for all routes but those of adapters; None lets everyone in.
        admin_key: for loading and unloading adapters; None lets no one.
    """

    def __init__(self, api_key: str | None, admin_key: str | None) -> None:
        self._api_key, self._admin_key = _digest(api_key), _digest(admin_key)

    def check(self, headers: Iterable[tuple[bytes, bytes]], admin: bool) -> None:
        """Lets a request with these headers pass.

        Raises:
            ApiError: 401 without the right key; 403 where that key does not do.
        """
        if admin and self._admin_key is None:
            raise ApiError(
                403,
                "adapters are not loaded or unloaded here: start lorakit serve with --admin-key "
                "and --adapter-root",
                code="admin_key_required",
            )
        given = key_of(headers)
        wanted = self._admin_key if admin else self._api_key
        if wanted is None or _equal(given, wanted):
            return
        if admin and self._api_key is not None and _equal(given, self._api_key):
            raise ApiError(
                403, "this needs the admin key, not the API key", code="admin_key_required"
            )
        name = "admin key" if admin else "API key"
        fault = "is missing" if given is None else "is not right"
        raise ApiError(
            401,
            f"the {name} {fault}: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request brings, in `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
        if name == b"x-api-key":
            return value.strip()
    return None


def owner_of(request: Request) -> str:
    """What stands for the key of a request in files and comparisons."""
    return sha256(key_of(request.scope["headers"]) or b"").hexdigest()[:32]


def _digest(key: str | None) -> bytes | None:
    return None if key is None else sha256(key.encode()).digest()


def _equal(given: bytes | None, digest: bytes) -> bool:
    # Of digests, so that the time does not tell the key's length either.
    return given is not None and hmac.compare_digest(sha256(given).digest(), digest)


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
