"""How near a completion's length is to a wanted one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorakit.rewards.completion_text import text_of

UNITS = ("tokens", "words", "characters")


@dataclass(frozen=True)
class TargetLength:
    """`max(0, 1 - |n - target| / target)`: 1 at the length that is wanted, 0 at twice of it.

    Attributes:
        target: the length.
        unit: tokens, words (between white space) or characters.
    """

    target: float
    unit: str = "tokens"
    main: ClassVar[str] = "target"

    def __post_init__(self) -> None:
        if isinstance(self.target, bool) or not self.target > 0:
            raise ValueError(f"target is {self.target!r}: give a number above 0")
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}: give one of {', '.join(UNITS)}")

    def __call__(
        self, completions: list[Any], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        lengths = [
            self._length(text_of(one), ids)
            for one, ids in zip(completions, completion_ids, strict=True)
        ]
        return [max(0.0, 1 - abs(n - self.target) / self.target) for n in lengths]

    def _length(self, text: str, ids: list[int]) -> int:
        if self.unit == "tokens":
            return len(ids)
        return len(text.split()) if self.unit == "words" else len(text)
