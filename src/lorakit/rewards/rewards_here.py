"""Reward functions that were given from Python, called in this process.

They cannot be sent to another one, so their limit of time holds for what returns to Python now and
then, or waits for something outside: what computes in C without returning is not interrupted.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorakit.rewards.calling import Outcome, called
from lorakit.rewards.reward_arguments import RewardCall, parameters
from lorakit.time_limit import TimeLimitError, time_limit


class RewardsHere:
    """Functions of this process; what it has in common with `RewardProcess` is `ask`."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self._functions = list(functions)
        takes = [parameters(function)[0] for function in functions]
        self.required = [[name for name, needed in names.items() if needed] for names in takes]
        self.files: dict[str, str] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def ask(
        self, which: Sequence[int], call: RewardCall, seconds: float | None
    ) -> dict[int, Outcome]:
        """What each of the functions, by its number, gives; `seconds` as in `RewardProcess`."""

        def together(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
            async def all_of_them() -> list[Any]:
                limited = [asyncio.wait_for(one, seconds) for one in awaitables]
                return await asyncio.gather(*limited, return_exceptions=True)

            return asyncio.run_coroutine_threadsafe(all_of_them(), self._own_loop()).result()

        limited = [_limited(self._functions[i], seconds) for i in which]
        passes = (KeyboardInterrupt,)
        outcomes: dict[int, Outcome] = {}
        for position, outcome in called(limited, call, lambda _: None, together, passes):
            outcomes[which[position]] = outcome
        return outcomes

    def close(self) -> None:
        """Ends the thread in which async functions run."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        """One loop for all calls, as clients keep theirs; a notebook's thread has its own."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        return self._loop


def _limited(function: Callable[..., Any], seconds: float | None) -> Callable[..., Any]:
    @functools.wraps(function)
    def within_limit(*args: Any, **columns: Any) -> Any:
        with _limit(seconds):
            return function(*args, **columns)

    within_limit.__signature__ = _signature(function)  # type: ignore[attr-defined]
    return within_limit


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return None


@contextmanager
def _limit(seconds: float | None) -> Iterator[None]:
    """As `time_limit`; in the main thread, waiting for something outside is interrupted too.

    The signal is one that hardly anyone uses: a function may set alarms of its own.
    """
    if seconds is None:
        yield
        return
    here = threading.current_thread()
    if here is not threading.main_thread() or not hasattr(signal, "pthread_kill"):
        with time_limit(seconds):
            yield
        return
    done = False

    def late(*_: Any) -> None:
        if not done:
            raise TimeLimitError

    before = signal.signal(signal.SIGVTALRM, late)
    number = here.ident or 0
    timer = threading.Timer(seconds, lambda: signal.pthread_kill(number, signal.SIGVTALRM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        done = True
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGVTALRM, before)
