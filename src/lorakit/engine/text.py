"""The text of an answer while its tokens come, up to a text that ends it.

A token may hold part of a character, and how one reads depends on the tokens before it, so text
is given out when it is sure. What may be the beginning of a stop text is held back, and so is what
a template writes before an answer and is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what the first bytes of a character decode to
_LONGEST_CHARACTER = 4  # tokens, where each is a byte


class AnswerText:
    """Turns the tokens of one answer into text, piece by piece; without a tokenizer into none.

    Args:
        special: whether the names of special tokens stand in the text.
        included: those of `stop` that are part of the text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        stop: Sequence[str] = (),
        before: str = "",
        special: bool = False,
        included: Sequence[str] = (),
    ) -> None:
        self._tokenizer, self._stop, self._before = tokenizer, stop, before
        self._included = included
        self._skipped = not special
        self._tokens: list[int] = []
        self._begin = self._read = 0  # tokens that give context; tokens that are text already
        self._held = ""
        self.stopped = False
        """Whether a stop text has come."""

    def add(self, token: int, *, stops: bool = True) -> str:
        """What is sure of the text now that `token` has come, and was not before.

        Args:
            stops: whether a stop text may end it here.
        """
        self._tokens.append(token)
        return self._release(self._new_text(), stops=stops)

    def finish(self) -> str:
        """What is left when the answer is at its end."""
        if self.stopped:
            return ""
        text = self._release(self._new_text(final=True), final=True)
        text, self._held = text + self._held, ""
        return text

    def _new_text(self, final: bool = False) -> str:
        before = self._decode(self._tokens[self._begin : self._read])
        whole = self._decode(self._tokens[self._begin :])
        new = whole[len(before) :]
        waiting = len(self._tokens) - self._read <= _LONGEST_CHARACTER
        if not final and new.endswith(_UNFINISHED) and waiting:
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return new

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skipped))

    def _release(self, new: str, final: bool = False, stops: bool = True) -> str:
        text = self._held + new
        self._held = ""
        if self._before:
            if not final and text != self._before and self._before.startswith(text):
                self._held = text
                return ""
            text = text.removeprefix(self._before)
            self._before = ""
        if not stops:
            return text
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            at, stop = min(found)
            return text[: at + len(stop)] if stop in self._included else text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
