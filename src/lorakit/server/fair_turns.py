"""Work before an answer's row, one piece at a time in a thread, in an order that is fair.

Rendering and tokenizing take time in proportion to a prompt, so that prompts of megabytes would
hold up every short one behind them. Here short work overtakes long work, and the more work of one
client waits, the more is that client's overtaken. Nothing is put off for ever: work is done in the
order of its arrival plus a delay that its length sets.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

Result = TypeVar("Result")

_CHARACTERS_A_SECOND = 1_000_000
"""About how fast text is tokenized; work of so many characters is overtaken for so long."""


class Turns:
    """A thread that works in a fair order.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._of_client: Counter[str] = Counter()
        self._numbers = count()
        self._busy = False

    @property
    def idle(self) -> bool:
        """Whether nothing is worked on, and nothing waits."""
        return not self._busy and not self._waiting

    async def run(self, work: Callable[[], Result], characters: int, client: str) -> Result:
        """The result of `work`, when it had its turn. Cancelling gives up a turn that has not come.

        Args:
            characters: how much text it works on.
            client: who wants it; all work of one client has one name.
        """
        loop = asyncio.get_running_loop()
        self._of_client[client] += 1
        cost = characters / _CHARACTERS_A_SECOND * self._of_client[client]
        turn: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiting, (loop.time() + cost, next(self._numbers), turn))
        self._next()
        try:
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it came in the same moment
                    self._pass_on()
                raise
            working = loop.run_in_executor(self._thread, work)
            working.add_done_callback(self._done)
            # A thread cannot be interrupted: the next turn comes when the work has really ended.
            return await asyncio.shield(working)
        finally:
            self._of_client[client] -= 1
            if not self._of_client[client]:
                del self._of_client[client]

    def _done(self, working: asyncio.Future[Result]) -> None:
        if not working.cancelled():
            working.exception()  # who asked may be gone: the error is not lost, nobody wants it
        self._pass_on()

    def _pass_on(self) -> None:
        self._busy = False
        self._next()

    def _next(self) -> None:
        while self._waiting and not self._busy:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():  # its request was cancelled
                self._busy = True
                turn.set_result(None)
