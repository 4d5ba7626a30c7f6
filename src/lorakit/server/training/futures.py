"""Results that clients fetch later: a promise for each request, polled until it has ended.

A client polls one result at a time, or asks for a sampling session's requests that have ended
since it last asked. Results are kept for some minutes, up to a number of bytes of each owner's.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from lorakit.errors import InputError, LorakitError, one_line

POLL_SECONDS = 20.0
"""How long a poll is held while there is no result; the SDK gives up after 45."""
_KEPT_SECONDS = 600.0
_KEPT_BYTES = 128 << 20
_SMALL = 256  # bytes of a result that is no array

Result = bytes | dict[str, Any]


@dataclass(eq=False)
class Promise:
    """A request that is under way or has ended.

    Attributes:
        owner: whose it is, and who may fetch it.
        group: the sampling session and the client of it that has sent the request, if one has.
        task: its result, or what it failed with.
        ended: when, on the monotonic clock.
        number: its place among those that have ended.
    """

    request_id: str
    owner: str
    task: asyncio.Task[Result]
    group: str = ""
    ended: float | None = None
    number: int = 0

    @property
    def size(self) -> int:
        """Bytes of its result, once it has ended."""
        if self.failed:
            return _SMALL
        result = self.task.result()
        return len(result) if isinstance(result, bytes) else _SMALL

    @property
    def failed(self) -> bool:
        """Whether it has ended without a result."""
        return self.task.cancelled() or self.task.exception() is not None


@dataclass
class _Kept:
    """The requests of an owner that have ended, in their order, with the bytes of their results."""

    ended: OrderedDict[Promise, int] = field(default_factory=OrderedDict)
    bytes: int = 0


class Promises:
    """The promises of a server. All methods are for its event loop."""

    def __init__(self) -> None:
        self._promises: dict[tuple[str, str], Promise] = {}
        self._kept: dict[str, _Kept] = {}  # what has ended, by owner
        self._numbers = 0
        self._news = asyncio.Event()  # of the next that ends
        self._closed = ""

    def find(self, request_id: str, owner: str) -> Promise | None:
        """A promise of this owner's; None where there is none, or none any more."""
        return self._promises.get((owner, request_id))

    def open(
        self, request_id: str, owner: str, work: Coroutine[Any, Any, Result], group: str = ""
    ) -> Promise:
        """Begins `work`; a request of the same id that was there before has its promise."""
        if (there := self.find(request_id, owner)) is not None:
            work.close()
            return there
        promise = Promise(request_id, owner, asyncio.ensure_future(work), group)
        self._promises[owner, request_id] = promise
        promise.task.add_done_callback(lambda _: self._end(promise))
        return promise

    async def poll(self, promise: Promise, seconds: float = POLL_SECONDS) -> Result | None:
        """The result, once it is there within so many seconds; else None.

        A failure is `{"error": …, "category": "user" | "server"}`.
        """
        await asyncio.wait({promise.task}, timeout=seconds)
        if not promise.task.done():
            return None
        if promise.task.cancelled():
            category = "server" if self._closed else "user"
            return {"error": self._closed or "the request was cancelled", "category": category}
        error = promise.task.exception()
        return promise.task.result() if error is None else failure(error)

    async def ended(
        self, owner: str, group: str, after: int, seconds: float = POLL_SECONDS
    ) -> list[Promise]:
        """The requests of a group that have ended after number `after`; waits for the first."""
        found: list[Promise] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (found := self._since(owner, group, after)):
                    await self._news.wait()
        return found

    def _since(self, owner: str, group: str, after: int) -> list[Promise]:
        ended = self._kept[owner].ended if owner in self._kept else {}
        newer = takewhile(lambda promise: promise.number > after, reversed(ended))
        return [promise for promise in newer if promise.group == group][::-1]

    def drop(self, owner: str, request_ids: Iterable[str]) -> None:
        """Forgets requests whose results have been fetched."""
        for request_id in request_ids:
            promise = self.find(request_id, owner)
            if promise is not None and promise.ended is not None:
                self._forget(promise)

    def under_way(self, owner: str | None = None) -> int:
        """How many requests of an owner's are under way, of all without one."""
        running = (p for p in self._promises.values() if p.ended is None)
        return sum(owner in (None, p.owner) for p in running)

    def cancel_all(self, why: str) -> None:
        """Ends everything, as the server ends; those who poll are told why."""
        self._closed = why
        for promise in self._promises.values():
            promise.task.cancel()

    def _end(self, promise: Promise) -> None:
        now = promise.ended = time.monotonic()
        self._numbers += 1
        promise.number = self._numbers
        own = self._kept.setdefault(promise.owner, _Kept())
        own.ended[promise] = promise.size
        own.bytes += promise.size
        while own.bytes > _KEPT_BYTES and (oldest := next(iter(own.ended))) is not promise:
            self._forget(oldest)
        for kept in [*self._kept.values()]:
            while (
                kept.ended and now - ((old := next(iter(kept.ended))).ended or now) > _KEPT_SECONDS
            ):
                self._forget(old)
        self._news.set()
        self._news = asyncio.Event()

    def _forget(self, promise: Promise) -> None:
        own = self._kept[promise.owner]
        own.bytes -= own.ended.pop(promise)
        self._promises.pop((promise.owner, promise.request_id), None)
        if not own.ended:
            del self._kept[promise.owner]


def failure(error: BaseException) -> dict[str, Any]:
    """What a client gets in the place of a result."""
    if isinstance(error, InputError):
        return {"error": one_line(str(error)), "category": "user"}
    kind = "" if isinstance(error, LorakitError) else f"{type(error).__name__}: "
    return {"error": one_line(f"{kind}{error}"), "category": "server"}
