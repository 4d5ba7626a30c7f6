"""The live state of the training service: sessions, and the runs that are trained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lorakit.errors import InputError
from lorakit.server.training.checkpoints import Run

T = TypeVar("T")

HOLE_SECONDS = 600.0
"""How long a request waits for an earlier one that has not come."""


@dataclass(eq=False)
class Session:
    """A client's session: what was created in it.

    Attributes:
        seen: when the client was last heard of, on the monotonic clock.
    """

    session_id: str
    owner: str
    seen: float
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None
    runs: list[str] = field(default_factory=list)
    samplers: list[str] = field(default_factory=list)


class LiveRun:
    """A run that is trained: its adapter, and its requests in the order of their numbers.

    Args:
        record: what its file says.
        adapter: its name in the resident model.
    """

    def __init__(self, record: Run, adapter: str) -> None:
        self.record, self.adapter = record, adapter
        self._next = 1
        self._turns: dict[int, asyncio.Future[None]] = {}

    async def in_order(
        self, seq_id: int, start: Callable[[], Coroutine[Any, Any, T] | asyncio.Future[T]]
    ) -> T:
        """Calls `start` when all requests before `seq_id` have been started, and awaits it.

        What `start` hands in is executed in the order in which it is called.

        Raises:
            InputError: an earlier request does not come, or this one has been passed over.
        """
        await self._turn(seq_id)
        try:
            begun = asyncio.ensure_future(start())
            await asyncio.sleep(0)  # a coroutine hands in what it hands in until it first waits
        finally:
            self._advance(seq_id)
        return await begun

    async def _turn(self, seq_id: int) -> None:
        if seq_id < self._next or seq_id in self._turns:
            raise InputError(f"request {seq_id} of this model has been executed already")
        if seq_id == self._next:
            return
        turn = self._turns[seq_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(HOLE_SECONDS):
                await turn
        except TimeoutError as error:
            missing = self._next
            if seq_id == min(self._turns, default=seq_id):  # the first that waits goes on
                self._next = seq_id
                return
            raise InputError(
                f"request {missing} of this model did not come within {HOLE_SECONDS:g} s, and "
                f"request {seq_id} waited for it"
            ) from error
        finally:
            self._turns.pop(seq_id, None)

    def _advance(self, seq_id: int) -> None:
        self._next = max(self._next, seq_id + 1)
        turn = self._turns.get(self._next)
        if turn is not None and not turn.done():
            turn.set_result(None)
