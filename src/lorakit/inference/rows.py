"""One answer while it is written: what it has, what comes next, and when it ends."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from lorakit.inference.choosing import Chooser
from lorakit.inference.requests import ChosenToken, FinishReason, Piece, Ticket, TokenLogprob
from lorakit.inference.text import AnswerText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row:
    """A request in a batch.

    Attributes:
        adapter: the key of its adapter in the slots; None for the base alone.
        read: how many tokens of the prompt the model has seen.
        last: the newest token of the answer, which the model has not seen yet.
        new_tokens: how many tokens the answer has.
        finished: whether the last piece has been handed over.
    """

    def __init__(
        self,
        ticket: Ticket,
        adapter: Hashable | None,
        tokenizer: PreTrainedTokenizerBase,
        ends: frozenset[int],
        device: torch.device,
    ) -> None:
        self.ticket, self.adapter = ticket, adapter
        self.prompt = ticket.prompt
        self.read = self.new_tokens = self.last = 0
        self.finished = False
        self._tokenizer, self._ends = tokenizer, ends
        self._chooser = Chooser(ticket.sampling, self.prompt, device)
        self._text = AnswerText(tokenizer, ticket.sampling.stop)
        self._logprobs: list[ChosenToken] = []

    @property
    def is_plain(self) -> bool:
        """Whether its next token is the likeliest one, and nothing else is asked for."""
        return self._chooser.is_plain and self.ticket.sampling.logprobs is None

    @property
    def length(self) -> int:
        """How many of its tokens the model has seen."""
        return self.read + max(0, self.new_tokens - 1)

    def advance(self, logits: torch.Tensor, likeliest: int | None = None) -> int:
        """Chooses the next token by `logits` (vocabulary,), takes it in, and returns it.

        Args:
            likeliest: the token of the largest, where that is known and `is_plain`.
        """
        if likeliest is not None:
            token = likeliest
        else:
            logits = logits.float()
            asked = self.ticket.sampling.logprobs
            # Kept before the choice, which may change the logits.
            logs = None if asked is None else logits.log_softmax(-1)
            token = self._chooser.choose(logits)
            if logs is not None:
                self._logprobs.append(self._logprob(logs, token, asked or 0))
        self._took(token)
        return token

    def finish(self, reason: FinishReason, error: str = "", text: str = "") -> None:
        """Ends the answer, with the text that was held back."""
        if not self.finished:
            self.finished = True
            self._hand_over(text + self._text.finish(), reason, error)

    def _took(self, token: int) -> None:
        self.last = token
        self.new_tokens += 1
        self._chooser.took(token)
        if token in self._ends:
            self.finish("stop")
            return
        text = self._text.add(token)
        if self._text.stopped:
            self.finish("stop", text=text)
        elif self.new_tokens >= self.ticket.sampling.max_new_tokens:
            self.finish("length", text=text)
        elif text or self._logprobs:
            self._hand_over(text)

    def _hand_over(self, text: str, reason: FinishReason | None = None, error: str = "") -> None:
        logprobs, self._logprobs = tuple(self._logprobs), []
        self.ticket.put(Piece(text, logprobs, self.new_tokens, reason, error))

    def _logprob(self, logs: torch.Tensor, token: int, rivals: int) -> ChosenToken:
        top = logs.topk(min(rivals, len(logs)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return ChosenToken(
            token,
            self._read(token),
            logs[token].item(),
            tuple(TokenLogprob(other, self._read(other), value) for other, value in pairs),
        )

    def _read(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))
