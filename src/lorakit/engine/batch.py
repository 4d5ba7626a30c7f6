"""Answers that are written together, a token each a step; they join and leave at any step.

A step reads prompts of rows that have come, short ones together and long ones in parts; then all
rows whose prompts are read write one token. The route says which adapter serves which row. Where a
forward fails, its rows are computed one by one, so that only those end that fail alone too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.engine.cache import row_cache
from lorakit.engine.picture_prompt import picture_inputs, place_pictures
from lorakit.engine.rows import AnswerRow, reason
from lorakit.errors import LorakitError
from lorakit.lora.routing import Route, Routing
from lorakit.models.loaded import copied_once

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from lorakit.engine.picture_features import PictureFeatures

_Inputs = Callable[[int, Sequence[AnswerRow]], dict[str, Any]]

CHUNK = 512
"""Tokens of prompts that are read in one step, so that no answer waits long for its next token."""


class Batch(Protocol):
    """Rows that are computed together, in the two forms that there are."""

    @property
    def rows(self) -> Sequence[AnswerRow]:
        """Those that are not finished."""

    def has_room(self) -> bool:
        """Whether another row may join now."""

    def add(self, row: AnswerRow) -> None:
        """Takes a row in; its adapter is in the bank."""

    def step(self) -> None:
        """Computes something, and lets go of the rows that are finished."""


class ContinuousBatch:
    """Rows with a cache of their own, for models that it carries (`carried.py`).

    Args:
        model: the causal language model with the bank's layers in it.
        routing: the bank's.
        most: how many rows there may be.
        length: how many tokens a row may have.
        route: of all rows; None where each has the adapter that it names.
        in_parts: whether a long prompt is read in parts, so that others go on meanwhile.
        padded: whether short prompts are read together.
        features: those of pictures; None computes them for each prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        routing: Routing,
        most: int,
        length: int,
        route: Route | None = None,
        in_parts: bool = True,
        padded: bool = True,
        features: PictureFeatures | None = None,
    ) -> None:
        self.rows: list[AnswerRow] = []
        self._model: Any = model
        self._features = features
        self._routing, self._most, self._route = routing, most, route
        self._in_parts, self._padded = in_parts, padded
        self._writing = 0  # the first so many rows have read their prompts
        self._cache = row_cache(model, most, length)

    def has_room(self) -> bool:
        return len(self.rows) < self._most

    def add(self, row: AnswerRow) -> None:
        self.rows.append(row)

    def step(self) -> None:
        self._leave()
        self._read_prompts()
        self._leave()
        self._write()
        self._leave()

    def _read_prompts(self) -> None:
        budget = CHUNK
        while budget > 0 and self._writing < len(self.rows):
            first = self._writing
            if self.rows[first].pictures is not None:
                rows = self.rows[first : first + 1]
                rows[0].read = len(rows[0].prompt)
                budget -= rows[0].read
                self._forward(first, rows, self._with_pictures)
            elif rows := self._whole_prompts(budget):
                budget -= len(rows) * max(len(row.prompt) for row in rows)
                for row in rows:
                    row.read = len(row.prompt)
                self._forward(first, rows, self._whole)
            else:
                rows = self.rows[first : first + 1]
                start, end = rows[0].read, len(rows[0].prompt)
                rows[0].read = min(start + budget, end) if self._in_parts else end
                budget = 0
                self._forward(first, rows, partial(self._part, start=start))
            self._writing += sum(row.read == len(row.prompt) for row in rows)

    def _whole_prompts(self, budget: int) -> list[AnswerRow]:
        """The next rows whose prompts fit into the budget together, with their padding."""
        rows: list[AnswerRow] = []
        longest = 0
        for row in self.rows[self._writing :]:
            longest = max(longest, len(row.prompt))
            if row.read or row.pictures or longest * (len(rows) + 1) > budget:
                break
            if rows and not (self._padded and self._cache.are_alike(0, longest)):
                break
            rows.append(row)
        return rows

    def _write(self) -> None:
        rows = self.rows[: self._writing]
        if self._cache.are_alike(*(row.length for row in rows)):
            if rows:
                self._forward(0, rows, self._newest)
            return
        for at, row in enumerate(rows):
            self._forward(at, [row], self._newest)

    def _forward(self, first: int, rows: Sequence[AnswerRow], inputs: _Inputs) -> None:
        """Computes the rows in the places from `first` on; those with whole prompts write a token.

        Args:
            inputs: the model's arguments for such rows, also for one of them.
        """
        try:
            given = inputs(first, rows)
            names = [row.adapter for row in rows]
            shape = tuple(given["input_ids"].shape)
            self._routing.route = self._route or Route.of_rows(names, shape)
            with copied_once(self._model):
                logits = self._model(**given, logits_to_keep=1).logits[:, -1]
        except Exception as error:
            failure = reason(error)
        else:
            self._choose(rows, logits)
            return
        if len(rows) == 1:
            rows[0].fail(f"the model failed while answering: {failure}")
            return
        for at, row in enumerate(rows, first):
            self._forward(at, [row], inputs)

    def _whole(self, first: int, rows: Sequence[AnswerRow]) -> dict[str, Any]:
        prompts = [row.prompt for row in rows]
        return self._cache.whole_prompts(first, prompts, self._model.device)

    def _with_pictures(self, first: int, rows: Sequence[AnswerRow]) -> dict[str, Any]:
        """Prompts with pictures are read whole and alone, as no picture may be divided."""
        [row] = rows
        given, width = self._whole(first, rows), len(row.prompt)
        if self._features is not None:
            given |= self._features.inputs(rows, width)
        else:
            given |= picture_inputs([row.asked()], width, self._model.device)
        positions, row.moved = place_pictures(row.asked(), given)
        return given | positions

    def _part(self, at: int, rows: Sequence[AnswerRow], start: int) -> dict[str, Any]:
        tokens = rows[0].prompt[start : rows[0].read]
        return self._cache.part_of_row(at, tokens, start, self._model.device)

    def _newest(self, first: int, rows: Sequence[AnswerRow]) -> dict[str, Any]:
        device = self._model.device
        if len(rows) < self._writing:
            [row] = rows
            if self._cache.keeps_states:  # a forward of all failed, which may have changed them
                if row.pictures:
                    raise LorakitError("another row's step failed, and its pictures are not reread")
                return self._cache.part_of_row(first, [*row.prompt, *row.tokens], 0, device)
            return self._cache.part_of_row(first, [row.last], row.length, device, row.moved)
        tokens, lengths = [row.last for row in rows], [row.length for row in rows]
        moved = [row.moved for row in rows]
        return self._cache.newest_tokens(tokens, lengths, device, moved)

    def _choose(self, rows: Sequence[AnswerRow], logits: torch.Tensor) -> None:
        """Has rows choose by their logits (rows, vocabulary); what is NaN or Inf ends the row."""
        largest, likeliest = logits.max(-1)  # NaN wherever a row has one
        chosen = zip(rows, logits, largest.tolist(), likeliest.tolist(), strict=True)
        for row, own, value, token in chosen:
            if not math.isfinite(value):
                row.fail_by_logits()
            elif row.read == len(row.prompt):
                row.advance(own, token if row.is_plain else None)

    def _leave(self) -> None:
        """Lets go of rows that are finished; those that stay close the gaps."""
        for at in reversed(range(len(self.rows))):
            row = self.rows[at]
            if row.ticket.cancelled.is_set():
                row.finish("cancelled")
            if row.failed:  # what it computed may be NaN or Inf
                self._cache.clear(at, row.length + 1)
            if row.finished:
                self._remove(at)

    def _remove(self, gap: int) -> None:
        # The last row that writes fills the gap, and the last of all fills that one's, so that
        # the rows that write stay the first ones.
        if gap < self._writing:
            self._writing -= 1
            self._move(self._writing, gap)
            gap = self._writing
        self._move(len(self.rows) - 1, gap)
        self.rows.pop()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._cache.move(source, target, self.rows[source].length)
            self.rows[target] = self.rows[source]
