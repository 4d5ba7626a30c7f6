"""The live state of the training service: sessions, and the runs that are trained."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lorakit.errors import InputError, LorakitError
from lorakit.server.keys import Caller
from lorakit.server.training.checkpoints import Run
from lorakit.server.training.history import History
from lorakit.server.training.messages import CreateSession

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
    ended: bool = False


class Sessions:
    """The sessions of clients that are heard of."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def create(self, asked: CreateSession, caller: Caller) -> str:
        """A new session's id."""
        name, given = asked.display_name, asked.user_metadata
        session = Session(str(uuid.uuid4()), caller.owner, time.monotonic(), given, name)
        self._sessions[session.session_id] = session
        return session.session_id

    def find(self, session_id: str, caller: Caller) -> Session:
        """A session of this caller's.

        Raises:
            InputError: there is none.
        """
        found = self._sessions.get(session_id)
        if found is None or not caller.sees(found.owner):
            raise InputError(f"there is no session {session_id!r}: create one")
        if caller.owner == found.owner:
            found.seen = time.monotonic()
        return found

    def of(self, caller: Caller) -> list[Session]:
        """Those that a caller sees, the newest first."""
        return [s for s in self._sessions.values() if caller.sees(s.owner)][::-1]

    def silent(self, seconds: float) -> list[Session]:
        """Those whose clients have not been heard of for so long."""
        late = time.monotonic() - seconds
        return [session for session in self._sessions.values() if session.seen < late]

    def remove(self, session_id: str, caller: Caller) -> Session:
        """Takes a session of this caller's out.

        Raises:
            InputError: there is none.
        """
        session = self.find(session_id, caller)
        session.ended = True
        return self._sessions.pop(session.session_id)


class LiveRun:
    """A run that is trained: its adapter, and its requests in the order of their numbers.

    Args:
        record: what its file says.
        adapter: its name in the resident model.
        history: of its losses.

    Attributes:
        used: when its last request came, on the monotonic clock.
        changes: how often its weights have changed.
        saving: held from the copy of its weights until this is written.
    """

    def __init__(self, record: Run, adapter: str, history: History) -> None:
        self.record, self.adapter, self.history = record, adapter, history
        self.used = time.monotonic()
        self.changes = 0
        self.saving = asyncio.Lock()
        self._next = 1
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._given_up: set[int] = set()  # of those behind the next

    def is_awaited(self, seq_id: int) -> bool:
        """Whether later requests wait for this one."""
        return seq_id == self._next and bool(self._turns)

    def end_waiting(self, why: str) -> None:
        """Fails the requests that wait for earlier ones."""
        for turn in self._turns.values():
            if not turn.done():
                turn.set_exception(LorakitError(why))

    async def in_order(
        self,
        seq_id: int,
        start: Callable[[], Coroutine[Any, Any, T] | asyncio.Future[T]],
        within: AbstractAsyncContextManager[None] | None = None,
    ) -> T:
        """Calls `start` when all requests before `seq_id` have been started, and awaits it.

        What `start` hands in is executed in the order in which it is called.

        Args:
            within: is entered before `start`, and later requests wait for that; it is left when
                the request has ended.

        Raises:
            InputError: an earlier request does not come, or this one has been passed over.
        """
        self.used = time.monotonic()
        await self._turn(seq_id)
        async with AsyncExitStack() as stack:
            try:
                if within is not None:
                    await stack.enter_async_context(within)
                begun = asyncio.ensure_future(start())
                await asyncio.sleep(0)  # a coroutine hands in what it does until it first waits
            finally:
                self._advance(seq_id)
            return await begun

    async def _turn(self, seq_id: int) -> None:
        if seq_id < self._next or seq_id in self._turns:
            raise InputError(f"request {seq_id} has been executed already, or came too late")
        if seq_id == self._next:
            return
        turn = self._turns[seq_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(HOLE_SECONDS):
                await turn
        except TimeoutError as error:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                return  # it came at the last moment
            missing = self._next
            self._given_up.add(seq_id)
            if seq_id == min(self._turns):  # those behind it go on without what is missing
                self._advance(seq_id)
            raise InputError(
                f"request {missing} of this model did not come within {HOLE_SECONDS:g} s, and "
                f"request {seq_id} waited for it"
            ) from error
        finally:
            self._turns.pop(seq_id, None)

    def _advance(self, seq_id: int) -> None:
        self._next = max(self._next, seq_id + 1)
        while self._next in self._given_up:
            self._given_up.discard(self._next)
            self._next += 1
        turn = self._turns.get(self._next)
        if turn is not None and not turn.done():
            turn.set_result(None)
