"""Drafts of what an answer goes on with, looked up in its prompt and in itself.

Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with n-grams in the place of a draft
model (prompt lookup, Saxena 2023; vLLM's method `ngram`). The model reads a draft in one forward;
each token is then chosen from the model's own distribution, as it would be without the draft, and
the rest of a draft is dropped where it differs. So an answer is the same, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from lorakit.errors import InputError, first_line, listed

if TYPE_CHECKING:
    from lorakit.engine.rows import AnswerRow

_LONGEST_WAIT = 16
"""Steps without a draft, at most, of a row whose drafts were all wrong."""


@dataclass(frozen=True)
class NgramSpeculation:
    """Settings of `--speculative-config`, by vLLM's names.

    Args:
        num_speculative_tokens: the most tokens of a draft.
        prompt_lookup_max, prompt_lookup_min: how many of the last tokens are looked up, the longest
            first. One that is not given is as the other; both are 5.
        method: `ngram`, the only one.

    Raises:
        InputError: a value is out of its range.
    """

    num_speculative_tokens: int
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    method: str = "ngram"

    def __post_init__(self) -> None:
        if self.method != "ngram":
            raise InputError(f"speculative_config: method must be ngram, not {self.method!r}")
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            optional = name != "num_speculative_tokens" and value is None
            if not optional and not (type(value) is int and 1 <= value <= 64):
                raise InputError(f"speculative_config: {name} must be from 1 to 64, not {value}")
        if self.shortest > self.longest:
            raise InputError("speculative_config: prompt_lookup_min is above prompt_lookup_max")

    @classmethod
    def from_json(cls, text: str) -> NgramSpeculation:
        """From vLLM's JSON, such as `{"method": "ngram", "num_speculative_tokens": 4}`.

        Raises:
            InputError: it is no such object.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InputError(f"speculative_config is not JSON: {first_line(error)}") from error
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or "num_speculative_tokens" not in values:
            raise InputError("speculative_config must be an object with num_speculative_tokens")
        if unknown := sorted(values.keys() - set(known)):
            raise InputError(f"speculative_config has {listed(unknown)}; there are {listed(known)}")
        return cls(**values)

    @property
    def longest(self) -> int:
        """The most tokens that are looked up."""
        return self.prompt_lookup_max or self.prompt_lookup_min or 5

    @property
    def shortest(self) -> int:
        """The fewest tokens that are looked up."""
        return self.prompt_lookup_min or self.prompt_lookup_max or 5


class Drafts:
    """The drafts of a batch's rows.

    Attributes:
        proposed, accepted: tokens of drafts so far.
    """

    def __init__(self, settings: NgramSpeculation) -> None:
        self.proposed = self.accepted = 0
        self._settings = settings
        self._rows: dict[AnswerRow, _Lookup] = {}

    def of(self, rows: Sequence[AnswerRow], tokens: int) -> list[list[int]]:
        """What each row may go on with; nothing where nothing was found.

        Args:
            tokens: that a forward may have of all rows together.
        """
        self._rows = {row: known for row, known in self._rows.items() if not row.finished}
        most = min(self._settings.num_speculative_tokens, tokens // max(1, len(rows)) - 1)
        drafts = []
        for row in rows:
            if row not in self._rows:
                self._rows[row] = _Lookup(self._settings, row.prompt)
            # The model's own token behind a draft needs room too.
            room = row.ticket.sampling.max_new_tokens - row.new_tokens - 1
            drafts.append(self._rows[row].draft(row.tokens, min(most, room)))
        return drafts

    def judge(self, row: AnswerRow, proposed: int, accepted: int) -> None:
        """Notes how many tokens of a row's draft were right."""
        self.proposed += proposed
        self.accepted += accepted
        if proposed and row in self._rows:
            self._rows[row].judge(accepted)


class _Lookup:
    """The tokens of one row, and where each n-gram of them was seen last."""

    def __init__(self, settings: NgramSpeculation, prompt: Sequence[int]) -> None:
        self._sizes = range(settings.longest, settings.shortest - 1, -1)
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # where the text behind an n-gram begins
        self._wrong = self._wait = 0
        self._prompt = len(prompt)
        self._add(prompt)

    def draft(self, answer: Sequence[int], most: int) -> list[int]:
        self._add(answer[len(self._tokens) - self._prompt :])
        if self._wait > 0:
            self._wait -= 1
            return []
        for size in self._sizes if most > 0 else ():
            at = self._next.get(tuple(self._tokens[-size:]))
            if at is not None:
                found = self._tokens[at : at + most]
                # What repeats itself up to the end goes on so.
                return (found * (most // len(found) + 1))[:most]
        return []

    def judge(self, accepted: int) -> None:
        self._wrong = 0 if accepted else self._wrong + 1
        self._wait = min(2**self._wrong, _LONGEST_WAIT) - 1 if self._wrong > 1 else 0

    def _add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if size <= end:
                    self._next[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)
