"""Features of pictures and the like, kept by keys up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch


class KeptFeatures:
    """Tensors, and what holds tensors, by key.

    Args:
        most_bytes: how much is kept; 0 keeps nothing.
        drops: where there is no room left, the one that was not used for longest goes (LRU). Else
            the new one is not kept: where all come in turn, as in epochs, LRU would drop each
            before it comes again.
    """

    def __init__(self, most_bytes: int, *, drops: bool = True) -> None:
        self._most, self._drops = most_bytes, drops
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Any:
        """What is kept, None for nothing."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, value: Any) -> Any:
        """Keeps `value`, if it may be, and returns it."""
        size = bytes_of(value)
        free = self._most if self._drops else self._most - self.bytes
        if key not in self._kept and size <= free:
            self._kept[key] = value, size
            self.bytes += size
            while self.bytes > self._most:
                self.bytes -= self._kept.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Drops everything."""
        self._kept.clear()
        self.bytes = 0


def bytes_of(value: Any) -> int:
    """The bytes of all tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0
