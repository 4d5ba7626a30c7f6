"""Who may ask: keys in the header `Authorization: Bearer KEY`, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from hashlib import sha256

from lorakit.server.errors import ApiError


class Keys:
    """The server's keys.

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
        given = _bearer(headers)
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


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
    return None


def _digest(key: str | None) -> bytes | None:
    return None if key is None else sha256(key.encode()).digest()


def _equal(given: bytes | None, digest: bytes) -> bool:
    # Of digests, so that the time does not tell the key's length either.
    return given is not None and hmac.compare_digest(sha256(given).digest(), digest)
