"""Whether a pattern is found in a completion."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from lorakit.rewards.completion_text import text_of


@dataclass(frozen=True)
class Regex:
    """1 where the pattern is found, else 0.

    Attributes:
        pattern: of Python's `re`; `.` matches line ends too.
        full: the whole completion must match, but for white space at its ends.
        ignore_case: small and capital letters are the same.
    """

    pattern: str
    full: bool = False
    ignore_case: bool = False
    main: ClassVar[str] = "pattern"

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(f"pattern is {self.pattern!r}: give a text")
        try:
            self._compiled()
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r}: {error}") from error

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        compiled = self._compiled()
        find = compiled.fullmatch if self.full else compiled.search
        return [float(find(text_of(one).strip()) is not None) for one in completions]

    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.DOTALL | (re.IGNORECASE if self.ignore_case else 0))
