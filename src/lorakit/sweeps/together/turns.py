"""Functions that run in turn, one at a time, until each waits for what all do together.

Every one has a thread of its own, so that it can be a training loop that knows nothing of the
others; but no two ever run at the same time, and the order is always the same. What they wait for
is done in the calling thread, with all cores; they themselves have one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

Wait = Callable[[Any], Any]
"""What a function calls with a request; it returns with the answer when all have one."""


class _ClosedError(BaseException):
    """Ends a function that nobody will answer any more."""


class _Player(threading.Thread):
    """A function's thread, which runs only while `play` waits for it."""

    def __init__(self, name: str, body: Callable[[Wait], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._body = body
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._answer: Any = None
        self._closing = False
        self.request: Any = None
        self.error: BaseException | None = None
        self.done = False

    def run(self) -> None:
        self._go.acquire()
        try:
            # A second pool of threads would leave the caller's asleep between its operations.
            torch.set_num_threads(1)
            if not self._closing:
                self._body(self._wait)
        except BaseException as error:  # it is the caller who decides what becomes of it
            self.error = error
        finally:
            self.done = True
            self._back.release()

    def _wait(self, request: Any) -> Any:
        self.request = request
        self._back.release()
        self._go.acquire()
        if self._closing:
            raise _ClosedError
        return self._answer

    def play(self, answer: Any) -> None:
        """Lets the function go on with `answer`, up to its next request or its end."""
        self._answer = answer
        self._go.release()
        self._back.acquire()

    def close(self) -> None:
        """Ends the function, wherever it is, and its thread."""
        self._closing = True
        self._go.release()
        self.join()


def take_turns(
    bodies: Mapping[str, Callable[[Wait], None]],
    together: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    around: Callable[[str], AbstractContextManager[None]],
    tolerated: tuple[type[BaseException], ...] = (),
) -> dict[str, BaseException]:
    """Runs all functions to their ends.

    Args:
        bodies: the functions by name, in the order of their turns; each is given `Wait`.
        together: makes the answers of the requests of all that are not at their end.
        around: entered for a function's every turn.
        tolerated: errors that end a function, and let the others go on.

    Returns: the tolerated errors, by name.
    """
    threads = torch.get_num_threads()
    players = [_Player(name, body) for name, body in bodies.items()]
    for player in players:
        player.start()
    try:
        playing, answers = players, dict.fromkeys(bodies)
        while playing:
            for player in playing:
                with around(player.name):
                    player.play(answers[player.name])
                if player.error is not None and not isinstance(player.error, tolerated):
                    raise player.error
            playing = [player for player in playing if not player.done]
            if playing:
                answers = dict(together({player.name: player.request for player in playing}))
    finally:
        for player in players:
            player.close()
        torch.set_num_threads(threads)  # of threads to come too, which they had set
    return {player.name: player.error for player in players if player.error is not None}
