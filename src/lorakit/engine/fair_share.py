"""Who is next, where several owners wait: the one that has been served the fewest tokens.

Start-time fair queueing (Goyal, Vin and Cheng 1996): an owner that begins to wait starts at the
count of those who wait already, so that nobody saves up what they did not ask for, and nobody
waits for what others asked for before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

_REMEMBERED = 1024


class FairShare:
    """Counts tokens by owner."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._floor = 0.0

    def served(self, owner: str) -> float:
        """The tokens that count for an owner."""
        return max(self._served.get(owner, 0.0), self._floor)

    def charge(self, owner: str, tokens: float) -> None:
        """Counts what an owner has been given."""
        self._served[owner] = self.served(owner) + tokens
        if len(self._served) > _REMEMBERED:  # who is at the floor is as good as new
            self._served = {o: s for o, s in self._served.items() if s > self._floor}

    def first(self, waiting: Iterable[str]) -> str:
        """The owner who is next of those who wait, at least one."""
        least = min(waiting, key=lambda owner: (self.served(owner), owner))
        self._floor = self.served(least)
        return least


class FairQueue(Generic[T]):
    """Items that wait, each owner's in their order; the next is of the owner served the least."""

    def __init__(self) -> None:
        self._share = FairShare()
        self._items: dict[str, deque[tuple[T, float]]] = {}
        self._first: deque[T] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, item: T, owner: str, tokens: float) -> None:
        """Adds an item that counts for so many tokens."""
        self._items.setdefault(owner, deque()).append((item, tokens))
        self._count += 1

    def push_first(self, item: T) -> None:
        """Gives back an item that was taken out: it is next."""
        self._first.appendleft(item)
        self._count += 1

    def pop(self) -> T:
        """Takes the next item out."""
        self._count -= 1
        if self._first:
            return self._first.popleft()
        owner = self._share.first(self._items)
        item, tokens = self._items[owner].popleft()
        if not self._items[owner]:
            del self._items[owner]
        self._share.charge(owner, tokens)
        return item

    def items(self) -> list[T]:
        """All that wait."""
        return [*self._first, *(item for own in self._items.values() for item, _ in own)]

    def keep(self, wanted: Callable[[T], bool]) -> None:
        """Drops the items that are not wanted."""
        self._first = deque(filter(wanted, self._first))
        kept = {o: deque(i for i in own if wanted(i[0])) for o, own in self._items.items()}
        self._items = {owner: own for owner, own in kept.items() if own}
        self._count = len(self._first) + sum(map(len, self._items.values()))
