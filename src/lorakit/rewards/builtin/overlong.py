"""DAPO's soft punishment of completions that become too long (arXiv:2503.14476, eq. 13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Overlong:
    """0 up to `max_completion_len - soft_punish_cache` tokens, from there falling to -1 at
    `max_completion_len`, and -1 beyond.

    Attributes:
        max_completion_len: L_max, in tokens.
        soft_punish_cache: L_cache, in tokens.
    """

    max_completion_len: int
    soft_punish_cache: int
    main: ClassVar[None] = None

    def __post_init__(self) -> None:
        for name in ("max_completion_len", "soft_punish_cache"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}: give a number of tokens")
        if self.soft_punish_cache > self.max_completion_len:
            raise ValueError("soft_punish_cache is more than max_completion_len")

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [self._punishment(len(ids)) for ids in completion_ids]

    def _punishment(self, length: int) -> float:
        begin = self.max_completion_len - self.soft_punish_cache
        if length <= begin:
            return 0.0
        if length > self.max_completion_len:
            return -1.0
        return (begin - length) / self.soft_punish_cache
