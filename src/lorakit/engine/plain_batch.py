"""Answers that `model.generate` writes together, for models that no cache of ours can carry.

Rows that have come are computed as one batch, each with its own adapter and its own sampling, until
the last of them is at its end; those that come meanwhile wait. What `generate` asks to process the
logits chooses every row's token here, so that an answer is made by the same rules as in
`ContinuousBatch`. Where `generate` fails, each row that is not at its end is computed alone. A
model whose answers change behind padding gets rows of one length at a time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from lorakit.engine.picture_prompt import picture_inputs
from lorakit.engine.rows import AnswerRow, reason
from lorakit.engine.sampling import generate, pad_left
from lorakit.models.padding import takes_left_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lorakit.engine.picture_features import PictureFeatures
    from lorakit.lora.routing import Route, Routing


class PlainBatch:
    """Rows that begin together. Arguments as in `ContinuousBatch`."""

    def __init__(
        self,
        model: PreTrainedModel,
        routing: Routing,
        most: int,
        route: Route | None = None,
        features: PictureFeatures | None = None,
    ) -> None:
        self.rows: list[AnswerRow] = []
        self._features = features
        self._model, self._routing, self._most, self._route = model, routing, most, route
        self._computed: list[AnswerRow] = []  # by the `generate` that runs
        self._written = 0  # tokens of each that it has written
        self._failure = ""

    def has_room(self) -> bool:
        return len(self.rows) < self._most

    def add(self, row: AnswerRow) -> None:
        self.rows.append(row)

    def step(self) -> None:
        """Writes the answers of all rows to their ends."""
        try:
            for rows in self._together():
                if not self._generate(rows) and len(rows) > 1:
                    for row in rows:
                        if not row.finished:
                            self._generate([row])
                for row in rows:
                    row.fail(f"the model failed while answering: {self._failure}")
        finally:
            self.rows, self._computed, self._failure = [], [], ""

    def _together(self) -> list[list[AnswerRow]]:
        """The rows that one `generate` writes: all, or those of one length where padding counts."""
        groups: dict[int, list[AnswerRow]] = {}
        for row in self.rows:
            groups.setdefault(len(row.prompt), []).append(row)
        if len(groups) == 1 or takes_left_padding(self._model):
            return [self.rows]
        return list(groups.values())

    def _generate(self, rows: list[AnswerRow]) -> bool:
        """Whether these rows could be written to their ends."""
        self._computed, self._written = rows, 0
        ids, mask = pad_left([row.prompt for row in rows], 0)
        settings = GenerationConfig(
            max_new_tokens=max(row.ticket.sampling.max_new_tokens for row in rows), pad_token_id=0
        )
        device = self._model.device
        try:
            with self._chosen(rows):
                generate(
                    self._model,
                    settings,
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    **self._pictures(rows, ids.shape[1]),
                    logits_processor=[self._choose],
                    stopping_criteria=[self._ended],
                )
        except Exception as error:
            self._failure = reason(error)
            return False
        return True

    def _pictures(self, rows: list[AnswerRow], width: int) -> dict[str, Any]:
        if self._features is not None:
            return self._features.inputs(rows, width)
        return picture_inputs([row.asked() for row in rows], width, self._model.device)

    def _chosen(self, rows: list[AnswerRow]) -> AbstractContextManager[None]:
        if self._route is not None:
            return self._routing.using(self._route)
        return self._routing.rows(self._model, [row.adapter for row in rows])

    def _choose(self, _ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Leaves each row one token: the next of its own, or else the one that it chooses."""
        chosen = torch.full_like(logits, -torch.inf)
        finite = logits.max(-1).values.isfinite().tolist()
        for row, own, is_finite, scores in zip(self._computed, logits, finite, chosen, strict=True):
            if row.ticket.cancelled.is_set():
                row.finish("cancelled")
            token = 0
            if self._written < row.new_tokens:  # written before, by a `generate` that failed
                token = row.tokens[self._written]
            elif not row.finished and not is_finite:
                row.fail_by_logits()
            elif not row.finished:
                token = row.advance(own.clone())
            scores[token] = 0
        self._written += 1
        return chosen

    def _ended(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([row.finished for row in self._computed], device=ids.device)
