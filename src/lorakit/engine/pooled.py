"""Numbers of a prompt instead of an answer: its embedding, or what a reward model gives to it.

Embeddings need no cache of keys and values: prompts that wait together are one padded batch, in
which each row has its own adapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lorakit.engine.requests import AnswerPiece
from lorakit.engine.rows import reason
from lorakit.engine.scoring import score
from lorakit.lora.routing import BASE, Route

if TYPE_CHECKING:
    from lorakit.engine.pool import Loaded, Version
    from lorakit.engine.requests import Ticket
    from lorakit.lora.routing import Routing
    from lorakit.models.sentence_pooling import Pooling

_TOKENS = 4096
"""Of a pass, with padding."""

Waiting = tuple["Ticket", "Version | None", "Loaded | None"]
Bring = Callable[["Version | None", "Loaded | None", Collection[str]], None]


def scored(
    model: Any, routing: Routing, ticket: Ticket, version: Version, head: torch.Tensor
) -> AnswerPiece:
    """The only piece of a request for what a head gives.

    Args:
        version: of its adapter, which is in the bank.
        head: the reward model's or classifier's.
    """
    pad = int(version.tokenizer.pad_token_id)
    found = score(model, routing, version.key, head, ticket.prompt, pad)
    return AnswerPiece(finish_reason="stop", scores=found)


class Embedder:
    """Answers requests for embeddings, on the thread that computes.

    Args:
        model: the base, with or without a head, with the bank's layers in it.
        routing: the bank's.
        pad_token_id: what shorter rows are filled with.
        bring: has an adapter in the bank, beside others that are needed.
    """

    def __init__(
        self, model: Any, routing: Routing, pooling: Pooling, pad_token_id: int, bring: Bring
    ) -> None:
        self._model, self._routing, self._pooling = model, routing, pooling
        self._pad, self._bring = pad_token_id, bring

    def answer(self, asked: Sequence[Waiting]) -> None:
        """Answers all of these; one that fails does so alone."""
        for group in _passes([one for one in asked if not _left(one[0])]):
            try:
                self._answer(group)
            except Exception as error:
                if len(group) > 1:
                    for one in group:
                        self.answer([one])
                else:
                    group[0][0].put(AnswerPiece(finish_reason="error", error=reason(error)))

    def _answer(self, group: Sequence[Waiting]) -> None:
        keys = [BASE if version is None else version.key for _, version, _ in group]
        for _, version, loaded in group:
            self._bring(version, loaded, keys)
        found = self.embeddings([ticket.prompt for ticket, *_ in group], keys)
        for (ticket, *_), values in zip(group, found.tolist(), strict=True):
            ticket.put(AnswerPiece(finish_reason="stop", embedding=tuple(values)))

    def embeddings(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str]) -> torch.Tensor:
        """The embeddings (rows, d) of prompts, each by the adapter of this name in the bank."""
        device = next(self._model.parameters()).device
        rows = [torch.tensor(prompt, device=device) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self._pad)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        body = self._model.base_model
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "use_cache" in inspect.signature(body.forward).parameters:
            given["use_cache"] = False
        with self._routing.using(Route.of_rows(adapters, (len(rows), ids.shape[1]))):
            h = body(**given).last_hidden_state
        return self._pooling(h, lengths)


def _left(ticket: Ticket) -> bool:
    """Whether nobody waits for a request any more, which ends it."""
    if ticket.cancelled.is_set():
        ticket.put(AnswerPiece(finish_reason="cancelled"))
        return True
    return False


def _passes(asked: Sequence[Waiting]) -> Iterator[list[Waiting]]:
    """Requests in groups that are computed together, of about one length."""
    group: list[Waiting] = []
    for one in sorted(asked, key=lambda one: -len(one[0].prompt)):
        if group and (len(group) + 1) * len(group[0][0].prompt) > _TOKENS:
            yield group
            group = []
        group.append(one)
    if group:
        yield group
