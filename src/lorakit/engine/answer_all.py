"""Many prompts answered by many models in one engine, in the order in which they were asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from lorakit.data.masking import TokenizedRow
from lorakit.data.prompts import Prompt
from lorakit.engine.engine import Engine
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.requests import Ticket, check_prompt
from lorakit.engine.sampling import Sampling
from lorakit.engine.shown import shown_text
from lorakit.errors import InputError, LorakitError


@dataclass(frozen=True)
class Answered:
    """An answer, by `model` (an adapter's name, or the base's), and what it cost in tokens."""

    model: str
    messages: tuple[dict[str, Any], ...]
    answer: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int

    def record(self) -> dict[str, Any]:
        """As a row that `lorakit` reads as data again: the conversation with its answer."""
        fields = asdict(self)
        answer = {"role": "assistant", "content": fields.pop("answer")}
        return {**fields, "messages": [*self.messages, answer]}


def answer_all(
    engine: Engine,
    prompts: Sequence[Prompt],
    models: Sequence[str | None],
    sampling: Sampling,
    variables: Mapping[str, Any] | None = None,
    notices: Counter[str] | None = None,
) -> Iterator[Answered]:
    """Every prompt's answer by every model (None is the base), a prompt's side by side.

    All are asked at once, and the engine computes as many together as it has rows.

    Args:
        variables: further ones of the chat template, such as `enable_thinking`.
        notices: counts prompts that the chat template does not show whole, by what to say.

    Raises:
        InputError: a prompt does not fit the context, or the chat template refuses it.
        LorakitError: the model failed.
    """
    notices = Counter() if notices is None else notices
    asked = [(prompt, model) for prompt in prompts for model in models]
    rows: list[TokenizedRow] = []
    for prompt, model in asked:
        with _named(prompt):
            tokenizer = engine.tokenizer_of(model)
            text = shown_text(prompt.messages, tokenizer, prompt.tools, variables, notices)
            rows.append(prompt_row(text, prompt.messages, tokenizer, where=prompt.where))
            check_prompt(rows[-1].input_ids, engine.context_length, engine.vocabulary)
    if not rows:
        return
    engine.fit_rows(max(map(len, rows)) + sampling.max_new_tokens)
    tickets: list[Ticket] = []
    for (prompt, model), row in zip(asked, rows, strict=True):
        try:
            with _named(prompt):
                tickets.append(engine.submit(row.input_ids, model, sampling, row.pictures))
        except InputError:
            for ticket in tickets:
                ticket.cancel()
            raise
    for (prompt, model), ticket in zip(asked, tickets, strict=True):
        pieces = list(ticket)
        last = pieces[-1]
        if last.error:
            raise LorakitError(f"{prompt.where}: {last.error}")
        yield Answered(
            model or engine.model_name,
            prompt.messages,
            "".join(piece.text for piece in pieces),
            last.finish_reason or "",
            ticket.prompt_tokens,
            last.new_tokens,
        )


@contextmanager
def _named(prompt: Prompt) -> Iterator[None]:
    """Has an InputError say which prompt it is of."""
    try:
        yield
    except InputError as error:
        named = str(error).startswith(prompt.where)
        raise InputError(str(error) if named else f"{prompt.where}: {error}") from error
