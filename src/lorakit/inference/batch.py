"""Answers that are written together, a token each a step; they join and leave at any step.

A step reads prompts of rows that have come, short ones together and long ones in parts; then all
rows whose prompts are read write one token. Which adapter serves which row: `lora/slots.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorakit.inference.cache import RowCache
from lorakit.inference.inputs import newest_tokens, part_of_prompt, whole_prompts
from lorakit.inference.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.lora.slots import AdapterSlots

CHUNK = 512
"""Tokens of prompts that are read in one step, so that no answer waits long for its next token."""


class Batch(Protocol):
    """Rows that are computed together, in the two forms that there are."""

    rows: list[Row]

    def has_room(self) -> bool:
        """Whether another row may join now."""

    def add(self, row: Row) -> None:
        """Takes a row in; its adapter is in the slots."""

    def step(self) -> None:
        """Computes something, and lets go of the rows that are finished."""


class ContinuousBatch:
    """Rows with a cache of their own, for models of plain causal attention.

    Args:
        model: the causal language model in which the slots' layers are.
        most: how many rows there may be.
        length: how many tokens a row may have.
    """

    def __init__(self, model: PreTrainedModel, slots: AdapterSlots, most: int, length: int) -> None:
        self.rows: list[Row] = []
        self._model: Any = model
        self._slots, self._most = slots, most
        self._writing = 0  # the first so many rows have read their prompts
        layers = model.config.get_text_config().num_hidden_layers
        self._cache = RowCache(layers, most, length)

    def has_room(self) -> bool:
        return len(self.rows) < self._most

    def add(self, row: Row) -> None:
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
            rows = self._whole_prompts(budget)
            if rows:
                logits = self._forward_whole(first, rows)
                budget -= len(rows) * max(len(row.prompt) for row in rows)
            else:
                rows = self.rows[first : first + 1]
                logits = self._forward_part(first, rows[0], budget)
                budget = 0
            for at, row in enumerate(rows, first):
                if row.read == len(row.prompt):
                    self._advance(at, logits[at - first])
                    self._writing += 1

    def _whole_prompts(self, budget: int) -> list[Row]:
        """The next rows whose prompts fit into the budget together, with their padding."""
        rows: list[Row] = []
        longest = 0
        for row in self.rows[self._writing :]:
            longest = max(longest, len(row.prompt))
            if row.read or longest * (len(rows) + 1) > budget:
                break
            rows.append(row)
        return rows

    def _forward_whole(self, first: int, rows: Sequence[Row]) -> torch.Tensor:
        """Reads prompts from their beginnings to their ends."""
        prompts = [row.prompt for row in rows]
        arguments = whole_prompts(self._cache, first, prompts, self._model.device)
        for row in rows:
            row.read = len(row.prompt)
        return self._forward(rows, arguments)

    def _forward_part(self, at: int, row: Row, most: int) -> torch.Tensor:
        """Reads at most so many tokens of a prompt, behind what has been read of it."""
        start, end = row.read, min(row.read + most, len(row.prompt))
        device = self._model.device
        arguments = part_of_prompt(self._cache, at, row.prompt, start, end, device)
        row.read = end
        return self._forward([row], arguments)

    def _write(self) -> None:
        rows = self.rows[: self._writing]
        if not rows:
            return
        tokens, lengths = [row.last for row in rows], [row.length for row in rows]
        arguments = newest_tokens(self._cache, tokens, lengths, self._model.device)
        logits = self._forward(rows, arguments)
        likeliest = logits.argmax(-1).tolist()
        for at, (row, best) in enumerate(zip(rows, likeliest, strict=True)):
            self._advance(at, logits[at], best if row.is_plain else None)

    def _forward(self, rows: Sequence[Row], arguments: dict[str, Any]) -> torch.Tensor:
        """The logits (rows, vocabulary) after the last token of each row."""
        self._slots.use([row.adapter for row in rows])
        return self._model(**arguments, logits_to_keep=1).logits[:, -1]

    def _advance(self, at: int, logits: torch.Tensor, likeliest: int | None = None) -> None:
        if logits.sum().isfinite() or logits.isfinite().all():
            self.rows[at].advance(logits, likeliest)
            return
        # What is not finite would reach whoever gets this place next, through any mask.
        self._cache.clear(at)
        self.rows[at].finish("error", "the model computed values that are not finite")

    def _leave(self) -> None:
        """Lets go of rows that are finished; those that stay close the gaps."""
        for at in reversed(range(len(self.rows))):
            row = self.rows[at]
            if row.ticket.cancelled.is_set():
                row.finish("cancelled")
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
