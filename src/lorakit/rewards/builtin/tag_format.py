"""Whether a completion is its reasoning in tags, and then its answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from lorakit.rewards.completion_text import text_of


@dataclass(frozen=True)
class TagFormat:
    """1 where the tags stand one behind the other, else 0.

    With the default, `think`, it is TRL's `think_format_reward`: the tag is opened once, and behind
    its end comes any text. Several tags are opened and closed once each, with nothing else between
    and behind them.

    Attributes:
        tags: their names.
        opened: the prompt ends with the first opening tag, as many chat templates write it, so
            that the completion begins within.
    """

    tags: tuple[str, ...] | list[str] | str = ("think",)
    opened: bool = False
    main: ClassVar[str] = "tags"

    def __post_init__(self) -> None:
        names = self._names()
        if not names or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"tags is {self.tags!r}: give names, such as [think, answer]")

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        return [float(self._fits(text_of(one))) for one in completions]

    def _names(self) -> tuple[str, ...]:
        return (self.tags,) if isinstance(self.tags, str) else tuple(self.tags)

    def _fits(self, text: str) -> bool:
        names = self._names()
        if self.opened and not text.startswith(f"<{names[0]}>"):
            text = f"<{names[0]}>{text}"
        marks = [f"<{name}>" for name in names]
        if len(names) > 1:
            marks += [f"</{name}>" for name in names]
        if any(text.count(mark) != 1 for mark in marks):
            return False
        blocks = (f"<{re.escape(name)}>.*?</{re.escape(name)}>" for name in names)
        end = r".*" if len(names) == 1 else r"\s*"
        return re.fullmatch(r"\s*".join(blocks) + end, text, re.DOTALL) is not None
