"""Requests whose pictures are decoded and resized, beside the thread that answers.

A large picture then holds up nobody else's next token. What is prepared takes memory, so no more
requests are here at once than there are rows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import TYPE_CHECKING, Any

from lorakit.engine.requests import AnswerPiece, Ticket
from lorakit.engine.rows import reason

if TYPE_CHECKING:
    from lorakit.engine.picture_features import PictureFeatures
    from lorakit.engine.picture_prompt import Prepared

Asked = tuple[Ticket, Any, Any]
"""A request as it waits in the engine's queue."""


class Preparing:
    """Requests under way to the batch.

    Args:
        features: what prepares pictures; None for a model that does not take them so.
        ready: takes a request back whose pictures are prepared.
        changed: held while one leaves, and notified then.
    """

    def __init__(
        self,
        features: PictureFeatures | None,
        ready: Callable[[Asked], None],
        changed: Condition,
    ) -> None:
        self._features, self._ready, self._changed = features, ready, changed
        self._under_way: list[Asked] = []
        self._thread = ThreadPoolExecutor(1, "lorakit-pictures")

    def __len__(self) -> int:
        return len(self._under_way)

    def takes(self, asked: Asked, adapter: str) -> bool:
        """Whether a request has pictures to prepare, which is begun then.

        Args:
            adapter: its adapter's name in the bank.
        """
        ticket = asked[0]
        if ticket.pictures is None or self._features is None or ticket.prepared is not None:
            return False
        self._under_way.append(asked)
        work = self._thread.submit(self._features.prepared, ticket.pictures, adapter)
        work.add_done_callback(lambda done: self._done(asked, done))
        return True

    def close(self) -> list[Asked]:
        """Ends, and returns the requests that were here; `changed` is held."""
        left, self._under_way = self._under_way, []
        self._thread.shutdown(wait=False, cancel_futures=True)
        return left

    def _done(self, asked: Asked, done: Future[tuple[Prepared, ...]]) -> None:
        ticket = asked[0]
        with self._changed:
            if asked not in self._under_way:  # it was closed meanwhile
                return
            self._under_way.remove(asked)
            if (error := done.exception()) is None:
                ticket.prepared = done.result()
                self._ready(asked)
            else:
                ticket.put(AnswerPiece(finish_reason="error", error=reason(error)))
            self._changed.notify()
