"""The keys of a server, and whose a request is by the key that it brings.

Any number of API keys may be given. What a key has created is its own: others see it only with the
admin key, which may do everything. Keys are kept and compared as digests.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from starlette.requests import Request

from lorakit.server.errors import ApiError
from lorakit.server.options import ApiKey

_LABEL = 8  # characters of a digest, where a key has no name


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request.

    Attributes:
        owner: a digest that stands for the key in files and comparisons.
        is_admin: whether it may see and change what others have.
    """

    owner: str
    is_admin: bool = False

    def sees(self, owner: str) -> bool:
        """Whether what has this owner is the caller's to use; what has none is everyone's."""
        return self.is_admin or owner in ("", self.owner)


class Keys:
    """The server's keys, as requests bring them (`key_of`), compared in constant time.

    Args:
        api_keys: for all routes but those of adapters; without any, everyone is let in.
        admin_key: for every route; None lets no one load adapters.
    """

    def __init__(self, api_keys: Sequence[ApiKey] = (), admin_key: str | None = None) -> None:
        self._api_keys = [_digest(key.value) for key in api_keys]
        self._admin_key = None if admin_key is None else _digest(admin_key)
        self._names = {_owner(key.value.encode()): key.name for key in api_keys if key.name}
        if admin_key is not None:
            self._names.setdefault(_owner(admin_key.encode()), "admin")

    @property
    def asked_for(self) -> bool:
        """Whether requests must bring a key."""
        return bool(self._api_keys)

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
        if self._is_admin(given) or (not admin and not self._api_keys):
            return
        if self._is_api_key(given):
            if not admin:
                return
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

    def caller(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """Whose a request with these headers is."""
        given = key_of(headers)
        return Caller(_owner(given or b""), self._is_admin(given))

    def label(self, owner: str) -> str:
        """What is shown in the place of a key: its name, or the beginning of its digest."""
        return self._names.get(owner, owner[:_LABEL])

    def _is_admin(self, given: bytes | None) -> bool:
        return self._admin_key is not None and _equal(given, self._admin_key)

    def _is_api_key(self, given: bytes | None) -> bool:
        # Of all keys, so that the time does not tell which one it is.
        return max(map(partial(_equal, given), self._api_keys), default=False)


def key_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key that a request brings, in `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
        if name == b"x-api-key":
            return value.strip()
    return None


def caller_of(request: Request) -> Caller:
    """Whose a request to an application is."""
    keys: Keys = request.app.state.keys
    return keys.caller(request.scope["headers"])


def _owner(key: bytes) -> str:
    return sha256(key).hexdigest()[:32]


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()


def _equal(given: bytes | None, digest: bytes) -> bool:
    # Of digests, so that the time does not tell the key's length either.
    return given is not None and hmac.compare_digest(sha256(given).digest(), digest)
