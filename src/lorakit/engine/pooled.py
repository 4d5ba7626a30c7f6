"""Numbers of a prompt instead of an answer: its embedding, or what a classifier gives to it.

Neither needs a cache of keys and values: prompts that wait together are one padded batch, in which
each row has its own adapter. Behind the body rows part: some are pooled to a vector, others go
through the head of their adapter or of the base.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lorakit.engine.requests import AnswerPiece
from lorakit.engine.rows import reason
from lorakit.engine.scoring import score
from lorakit.errors import LorakitError
from lorakit.lora.routing import BASE, Route

if TYPE_CHECKING:
    from lorakit.engine.adapter_reader import Loaded
    from lorakit.engine.pool import Version
    from lorakit.engine.requests import Ticket
    from lorakit.lora.routing import Routing
    from lorakit.models.classifier_form import SequenceHead
    from lorakit.models.sentence_pooling import Pooling

_TOKENS = 4096
"""Of a pass, with padding."""

_ROUNDING, _ROUNDING_OF_HALF = 1e-3, 1e-1
"""How far hidden states beside padding may be from those alone, as a part of the largest."""

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
    return _piece(found, is_embedding=False)


class Pooler:
    """Answers requests for embeddings and for what heads give, on the thread that computes.

    Args:
        model: the base, with or without a head, with the bank's layers in it.
        routing: the bank's.
        head: the base's own, of a classifier.
        pad_token_id: what shorter rows are filled with.
        typed: whether the tokenizer gives `token_type_ids`, so that rows without have zeros.
        bring: has an adapter in the bank, beside others that are needed.
    """

    def __init__(
        self,
        model: Any,
        routing: Routing,
        pooling: Pooling,
        head: SequenceHead | None,
        pad_token_id: int,
        typed: bool,
        bring: Bring,
    ) -> None:
        self._typed = typed
        self._model, self._routing, self._pooling = model, routing, pooling
        self._head, self._pad, self._bring = head, pad_token_id, bring

    @cached_property
    def _takes(self) -> Collection[str]:
        """What the body's forward is given by name."""
        return inspect.signature(self._model.base_model.forward).parameters

    def takes(self, ticket: Ticket, loaded: Loaded | None) -> bool:
        """Whether a request is for something that is computed here."""
        return ticket.sampling.embeds or self._head_of(loaded) is not None

    def answer(self, asked: Sequence[Waiting]) -> None:
        """Answers all of these; one that fails does so alone."""
        wanted = [one for one in asked if not _left(one[0])]
        for group in _passes(wanted, padded=len(wanted) > 1 and self._pads):
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
        prompts = [ticket.prompt for ticket, *_ in group]
        outputs, lengths = self._read(prompts, keys, [ticket.types for ticket, *_ in group])
        pieces = [AnswerPiece()] * len(group)
        for head, rows in self._by_head(group):
            own = _of_rows(outputs, rows, len(prompts[rows[0]]) if head else None)
            if head is None:
                found = self._pooling(own.last_hidden_state, lengths[rows]).tolist()
            else:
                ids = torch.tensor([prompts[i] for i in rows], device=lengths.device)
                found = head(own, ids).tolist()
            for i, values in zip(rows, found, strict=True):
                pieces[i] = _piece(values, is_embedding=head is None)
        for (ticket, *_), piece in zip(group, pieces, strict=True):
            ticket.put(piece)

    def embeddings(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str]) -> torch.Tensor:
        """The embeddings (rows, d) of prompts, each by the adapter of this name in the bank."""
        outputs, lengths = self._read(prompts, adapters, [()] * len(prompts))
        return self._pooling(outputs.last_hidden_state, lengths)

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[str],
        types: Sequence[Sequence[int]],
    ) -> tuple[Any, torch.Tensor]:
        """What the body gives for prompts, padded on the right, and their lengths (rows,)."""
        device = next(self._model.parameters()).device

        def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
            own = [torch.tensor(row, device=device) for row in rows]
            return pad_sequence(own, batch_first=True, padding_value=value)

        ids = padded(prompts, self._pad)
        lengths = torch.tensor([len(row) for row in prompts], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        given: dict[str, Any] = {"input_ids": ids}
        if "attention_mask" in self._takes:
            given["attention_mask"] = mask
        if "token_type_ids" in self._takes and (self._typed or any(types)):
            rows = [own or [0] * len(row) for own, row in zip(types, prompts, strict=True)]
            given["token_type_ids"] = padded(rows, 0)
        if "use_cache" in self._takes:
            given["use_cache"] = False
        with self._routing.using(Route.of_rows(adapters, (len(prompts), ids.shape[1]))):
            return self._model.base_model(**given), lengths

    @cached_property
    def _pads(self) -> bool:
        """Whether rows may be padded: tried, as a convolution or a transform reads padding too."""
        long, short = range(5, 15), range(5, 9)
        try:
            together, _ = self._read([long, short], [BASE] * 2, [()] * 2)
            alone, _ = self._read([short], [BASE], [()])
        except Exception:  # such as a vocabulary that is too small: no padding is always right
            return False
        expected = alone.last_hidden_state[0]
        found = together.last_hidden_state[1, : len(short)]
        rounding = _ROUNDING if expected.element_size() >= 4 else _ROUNDING_OF_HALF
        return bool((found - expected).abs().max() <= rounding * expected.abs().max())

    def _by_head(self, group: Sequence[Waiting]) -> Iterator[tuple[SequenceHead | None, list[int]]]:
        """The rows that go through one head, by their length, so that it sees no padding.

        Those that are pooled to an embedding have None.
        """
        found: dict[tuple[int, int], tuple[SequenceHead | None, list[int]]] = {}
        for i, (ticket, _, loaded) in enumerate(group):
            head = None if ticket.sampling.embeds else self._head_of(loaded)
            key = (0, 0) if head is None else (id(head), len(ticket.prompt))
            found.setdefault(key, (head, []))[1].append(i)
        yield from found.values()

    def _head_of(self, loaded: Loaded | None) -> SequenceHead | None:
        return self._head if loaded is None else loaded.classifier


def _of_rows(outputs: Any, rows: Sequence[int], length: int | None) -> Any:
    """What a body gave for some rows; up to `length` tokens of them where that is given."""
    own = {}
    width = outputs.last_hidden_state.shape[1]
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            value = value[[*rows]]
            own[name] = value[:, :length] if value.dim() > 2 and value.shape[1] == width else value
    return type(outputs)(**own)


def _piece(values: Sequence[float], *, is_embedding: bool) -> AnswerPiece:
    if not all(value - value == 0 for value in values):
        raise LorakitError("the model gives NaN or Inf for this")
    if is_embedding:
        return AnswerPiece(finish_reason="stop", embedding=tuple(values))
    return AnswerPiece(finish_reason="stop", scores=tuple(values))


def _left(ticket: Ticket) -> bool:
    """Whether nobody waits for a request any more, which ends it."""
    if ticket.cancelled.is_set():
        ticket.put(AnswerPiece(finish_reason="cancelled"))
        return True
    return False


def _passes(asked: Sequence[Waiting], *, padded: bool) -> Iterator[list[Waiting]]:
    """Requests in groups that are computed together, of about one length, or of one."""
    group: list[Waiting] = []
    for one in sorted(asked, key=lambda one: -len(one[0].prompt)):
        longest = len(group[0][0].prompt) if group else 0
        fits = (len(group) + 1) * longest <= _TOKENS
        if group and not (fits and (padded or len(one[0].prompt) == longest)):
            yield group
            group = []
        group.append(one)
    if group:
        yield group
