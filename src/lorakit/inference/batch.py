"""Answers that are written together, a token each a step; they join and leave at any step.

A step reads the prompts of rows that have come, in chunks, and then has all rows whose prompts are
read write one token. A prompt is one row's alone, whose adapter takes the plain product; the common
step takes the mixed one (`lora/slots.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorakit.inference.cache import RowCache
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
            at, row = self._writing, self.rows[self._writing]
            tokens = row.prompt[row.read : row.read + budget]
            budget -= len(tokens)
            logits = self._forward_prompt(at, row, tokens)
            row.read += len(tokens)
            if row.read == len(row.prompt):
                self._advance(at, logits)
                self._writing += 1

    def _forward_prompt(self, at: int, row: Row, tokens: Sequence[int]) -> torch.Tensor:
        start, end = row.read, row.read + len(tokens)
        self._cache.one_row(at, start)
        device = self._model.device
        mask = None
        if start:  # without a mask attention is causal from the first key on
            before = torch.arange(end, device=device)
            mask = (before <= torch.arange(start, end, device=device)[:, None])[None, None]
        positions = torch.arange(start, end, device=device)
        return self._forward([row.adapter], [tokens], positions[None], mask)[0]

    def _write(self) -> None:
        rows = self.rows[: self._writing]
        if not rows:
            return
        lengths = [row.length for row in rows]
        device = self._model.device
        self._cache.all_rows(lengths, device)
        positions = torch.tensor(lengths, device=device)[:, None]
        # Also where it hides nothing: with a mask a CPU takes the quicker of two ways.
        mask = (torch.arange(max(lengths) + 1, device=device) <= positions)[:, None, None]
        logits = self._forward(
            [row.adapter for row in rows], [[row.last] for row in rows], positions, mask
        )
        likeliest = logits.argmax(-1).tolist()
        for at, (row, best) in enumerate(zip(rows, likeliest, strict=True)):
            self._advance(at, logits[at], best if row.is_plain else None)

    def _advance(self, at: int, logits: torch.Tensor, likeliest: int | None = None) -> None:
        if logits.sum().isfinite() or logits.isfinite().all():
            self.rows[at].advance(logits, likeliest)
            return
        # What is not finite would reach whoever gets this place next, through any mask.
        self._cache.clear(at)
        self.rows[at].finish("error", "the model computed values that are not finite")

    def _forward(
        self,
        adapters: Sequence[Hashable | None],
        tokens: Sequence[Sequence[int]],
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The logits (rows, vocabulary) after the last of these tokens of each row."""
        self._slots.use(adapters)
        out = self._model(
            input_ids=torch.tensor(tokens, device=self._model.device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

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
