"""Results that clients fetch later: a promise for each request, polled until it has ended."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from lorakit.errors import InputError, LorakitError, one_line

POLL_SECONDS = 20.0
"""How long a poll is held while there is no result; the SDK gives up after 45."""
_KEPT_SECONDS = 600.0
_KEPT_BYTES = 256 << 20

Result = bytes | dict[str, Any]


@dataclass(eq=False)
class Promise:
    """A request that is under way or has ended.

    Attributes:
        owner: who may fetch it.
        task: its result, or what it failed with.
        ended: when, on the monotonic clock.
    """

    request_id: str
    owner: str
    task: asyncio.Task[Result]
    ended: float | None = None
    size: int = field(default=0)


class Promises:
    """The promises of a server. All methods are for its event loop."""

    def __init__(self) -> None:
        self._promises: OrderedDict[str, Promise] = OrderedDict()

    def find(self, request_id: str, owner: str) -> Promise | None:
        """A promise of this owner's; None where there is none, or none any more."""
        found = self._promises.get(request_id)
        return found if found is not None and found.owner == owner else None

    def open(self, request_id: str, owner: str, work: Coroutine[Any, Any, Result]) -> Promise:
        """Begins `work`; a request of the same id that was there before has its promise."""
        if (there := self.find(request_id, owner)) is not None:
            work.close()
            return there
        promise = Promise(request_id, owner, asyncio.ensure_future(work))
        self._promises[request_id] = promise
        promise.task.add_done_callback(lambda task: self._ended(promise))
        return promise

    async def poll(self, promise: Promise, seconds: float = POLL_SECONDS) -> Result | None:
        """The result, once it is there within so many seconds; else None.

        A failure is `{"error": …, "category": "user" | "server"}`.
        """
        await asyncio.wait({promise.task}, timeout=seconds)
        if not promise.task.done():
            return None
        if promise.task.cancelled():
            return {"error": "the request was cancelled", "category": "user"}
        error = promise.task.exception()
        return promise.task.result() if error is None else failure(error)

    def owned(self, owner: str) -> int:
        """How many requests of an owner's are under way."""
        return sum(p.owner == owner and p.ended is None for p in self._promises.values())

    def cancel_all(self) -> None:
        """Ends everything, as the server ends."""
        for promise in self._promises.values():
            promise.task.cancel()

    def _ended(self, promise: Promise) -> None:
        promise.ended = time.monotonic()
        if not promise.task.cancelled() and promise.task.exception() is None:
            result = promise.task.result()
            promise.size = len(result) if isinstance(result, bytes) else 256
        ended = [p for p in self._promises.values() if p.ended is not None]
        kept = sum(p.size for p in ended)
        for old in sorted(ended, key=lambda p: p.ended or 0):
            late = promise.ended - (old.ended or 0) > _KEPT_SECONDS
            if old is promise or not (late or kept > _KEPT_BYTES):
                break
            kept -= old.size
            del self._promises[old.request_id]


def failure(error: BaseException) -> dict[str, Any]:
    """What a client gets in the place of a result."""
    if isinstance(error, InputError):
        return {"error": one_line(str(error)), "category": "user"}
    kind = "" if isinstance(error, LorakitError) else f"{type(error).__name__}: "
    return {"error": one_line(f"{kind}{error}"), "category": "server"}
