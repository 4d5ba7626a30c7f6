"""Answers that `model.generate` writes together, for models that no cache of ours can carry.

Rows that have come are computed as one batch, each with its own adapter and its own sampling, until
the last of them is at its end; those that come meanwhile wait. What `generate` asks to process the
logits chooses every row's token here, so that an answer is made by the same rules as in
`ContinuousBatch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from lorakit.inference.rows import Row
from lorakit.inference.sampling import generate, pad_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.lora.slots import AdapterSlots


class PlainBatch:
    """Rows that begin together. Arguments as in `ContinuousBatch`."""

    def __init__(self, model: PreTrainedModel, slots: AdapterSlots, most: int) -> None:
        self.rows: list[Row] = []
        self._model, self._slots, self._most = model, slots, most

    def has_room(self) -> bool:
        return len(self.rows) < self._most

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def step(self) -> None:
        """Writes the answers of all rows to their ends."""
        rows = self.rows
        ids, mask = pad_left([row.prompt for row in rows], 0)
        self._slots.use([row.adapter for row in rows])
        settings = GenerationConfig(
            max_new_tokens=max(row.ticket.sampling.max_new_tokens for row in rows), pad_token_id=0
        )
        device = self._model.device
        try:
            generate(
                self._model,
                settings,
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=[self._choose],
                stopping_criteria=[self._ended],
            )
        finally:
            self.rows = []

    def _choose(self, _ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Leaves each row one token, the one that it has chosen."""
        chosen = torch.full_like(logits, -torch.inf)
        for row, own, scores in zip(self.rows, logits, chosen, strict=True):
            if row.ticket.cancelled.is_set():
                row.finish("cancelled")
            scores[0 if row.finished else row.advance(own.clone())] = 0
        return chosen

    def _ended(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([row.finished for row in self.rows], device=ids.device)
