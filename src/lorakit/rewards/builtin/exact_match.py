"""Whether a completion is the row's answer, to the letter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lorakit.rewards.completion_text import behind, text_of


@dataclass(frozen=True)
class ExactMatch:
    """1 where the completion equals the answer, else 0; None for a row without one.

    Attributes:
        column: with the answers; None for the row's own answer.
        after: a mark, such as `####`, behind whose last place the answer stands, in the
            completion and, where it is there, in the column.
        strip: without white space at the ends.
        ignore_case: small and capital letters are the same.
    """

    column: str | None = None
    after: str | None = None
    strip: bool = True
    ignore_case: bool = False
    main: ClassVar[str] = "column"

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        answers = columns["reference" if self.column is None else self.column]
        return [
            None if answer is None else float(self._is(text_of(completion), answer))
            for completion, answer in zip(completions, answers, strict=True)
        ]

    def _is(self, text: str, answer: Any) -> bool:
        wanted = answer if isinstance(answer, str) else _written(answer)
        if self.after and self.after in wanted:
            wanted = behind(wanted, self.after)
        if self.after and self.after not in text:
            return False
        return self._plain(behind(text, self.after)) == self._plain(wanted)

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


def _written(answer: Any) -> str:
    """A number without `.0`, and true and false as JSON has them."""
    if isinstance(answer, bool):
        return "true" if answer else "false"
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    return str(text_of(answer)) if isinstance(answer, list) else str(answer)
