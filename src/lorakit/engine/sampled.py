"""Answers as a training loop wants them: tokens, their log-probabilities, and why they ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lorakit.engine.requests import FinishReason, Ticket
from lorakit.engine.rows import AnswerRow
from lorakit.engine.sampling import Ending, Sampling
from lorakit.errors import InputError, LorakitError
from lorakit.lora.routing import BASE


@dataclass(frozen=True)
class Sampled:
    """An answer.

    Attributes:
        tokens: with the one that ended it, if one did.
        logprobs: of each token, in nats, before any sampling setting.
        finish_reason: `stop` at an end token, `length` at `max_new_tokens`.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


def rows_to_sample(
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[str],
    sampling: Sampling,
    ending: Ending,
    context: int,
    device: torch.device,
) -> list[AnswerRow]:
    """A row for each prompt, whose answer is cut to what the context has room for.

    Args:
        adapters: of each prompt, `BASE` for none.
        sampling: of all; with a seed, prompt number i draws from `seed + i`.
        context: the most tokens of prompt and answer together.

    Raises:
        InputError: the sampling settings have stop texts or a grammar, which need a tokenizer.
    """
    if sampling.stop or sampling.grammar is not None:
        raise InputError("stop texts and grammars need a tokenizer: use ends, tokens")
    rows: list[AnswerRow] = []
    for number, (name, prompt) in enumerate(zip(adapters, prompts, strict=True)):
        seed = None if sampling.seed is None else sampling.seed + number
        room = min(sampling.max_new_tokens, context - len(prompt))
        settings = replace(sampling, logprobs=0, seed=seed, max_new_tokens=room)
        ticket = Ticket(tuple(prompt), None if name == BASE else name, settings)
        rows.append(AnswerRow(ticket, name, None, ending, device))
    return rows


def sampled(row: AnswerRow) -> Sampled:
    """The answer of a finished row.

    Raises:
        LorakitError: the model failed.
    """
    pieces = list(row.ticket)
    if pieces[-1].error:
        raise LorakitError(pieces[-1].error)
    chosen = [token for piece in pieces for token in piece.logprobs]
    reason = pieces[-1].finish_reason
    assert reason is not None
    return Sampled([one.token for one in chosen], [one.logprob for one in chosen], reason)
