"""What each key has under way and on disk, and what it may have at most.

Too much at once is refused with 429, which the SDK repeats after a while; what could never be taken
fails through its result, so that no client repeats it for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from lorakit.errors import InputError
from lorakit.server.errors import ApiError
from lorakit.server.options import TrainingLimits

_RETRY_AFTER = 1


class Quotas:
    """Counts by owner. All methods are for the server's event loop.

    Attributes:
        limits: what a key may have.
        tokens: of requests that wait or are computed.
        trained: tokens that have gone through passes of training, ever since the server started.
        sampled: tokens that have been sampled.
        disk: of checkpoints, and of weights that sampling sessions have.
    """

    def __init__(self, limits: TrainingLimits) -> None:
        self.limits = limits
        self.tokens: Counter[str] = Counter()
        self.trained: Counter[str] = Counter()
        self.sampled: Counter[str] = Counter()
        self.disk = DiskQuota(limits.disk_bytes)

    def require_request(self, tokens: int) -> None:
        """Whether a request of so many tokens can ever be taken.

        Raises:
            InputError: it cannot.
        """
        if tokens > self.limits.tokens:
            raise InputError(
                f"this request has {tokens:,} tokens, and the requests of a key may have "
                f"{self.limits.tokens:,} together: send fewer rows at a time, or start lorakit "
                "serve with a larger --max-tokens-in-flight"
            )

    def require_room(self, owner: str, tokens: int) -> None:
        """Whether a request can be taken now, which is one that `require_request` lets pass.

        Raises:
            ApiError: 429, requests of this key have to end first.
        """
        if self.tokens[owner] and self.tokens[owner] + tokens > self.limits.tokens:
            raise ApiError(
                429,
                f"requests of this key with {self.tokens[owner]:,} tokens are under way, and with "
                f"{self.limits.tokens:,} at most: wait for some to end",
                code="rate_limit_exceeded",
                retry_after=_RETRY_AFTER,
            )

    @contextmanager
    def under_way(self, owner: str, tokens: int) -> Iterator[None]:
        """Counts tokens for as long as the block lasts."""
        self.tokens[owner] += tokens
        try:
            yield
        finally:
            self.tokens[owner] -= tokens
            if not self.tokens[owner]:
                del self.tokens[owner]

    def require_adapter(self, size: int) -> None:
        """Whether an adapter of so many bytes, with gradients and optimizer, has room in memory.

        Raises:
            InputError: it has not, even alone.
        """
        if size > self.limits.memory_bytes:
            raise InputError(
                f"this adapter takes {size:,} bytes with its gradients and optimizer state, and "
                f"{self.limits.memory_bytes:,} is the limit for all adapters in memory: take a "
                "lower rank, or start lorakit serve with a larger --max-adapter-memory"
            )

    def require_model(self, live: int) -> None:
        """Whether a key that has so many live models may have one more.

        Raises:
            InputError: it may not.
        """
        if live >= self.limits.models:
            raise InputError(
                f"this key has {live} models, which is as many as it may have: close the client "
                "of one, which ends its session; those of clients that vanished end an hour after "
                "they were last heard of"
            )


class DiskQuota:
    """How many bytes each owner has on disk. Methods are for any thread.

    Args:
        limit: for each of them; 0 is none.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._lock = limit, Counter[str](), Lock()

    def used(self) -> dict[str, int]:
        """By owner."""
        with self._lock:
            return dict(self._used)

    def count(self, owner: str, size: int) -> None:
        """Counts so many bytes more; they are there already."""
        with self._lock:
            self._count(owner, size)

    def has_room(self, owner: str, size: int) -> bool:
        """Whether an owner may have so many bytes more."""
        with self._lock:
            return self._has_room(owner, size)

    def take(self, owner: str, size: int) -> None:
        """Counts so many bytes more, or less.

        Raises:
            InputError: the owner may not have them.
        """
        with self._lock:  # of saves that end at once, only those that fit together
            if not self._has_room(owner, size):
                raise InputError(
                    f"the saved weights of this key have {self._used[owner]:,} bytes on disk, "
                    f"these have {size:,} more, and {self._limit:,} is the limit: delete "
                    "checkpoints (tinker checkpoint delete), or save with ttl_seconds"
                )
            self._count(owner, size)

    def _has_room(self, owner: str, size: int) -> bool:
        return not self._limit or size <= 0 or self._used[owner] + size <= self._limit

    def _count(self, owner: str, size: int) -> None:
        self._used[owner] = max(0, self._used[owner] + size)
