"""Rows of a question and its answer in two columns, with earlier turns beside them if any."""

from collections.abc import Callable, Mapping

from lorakit.data.column_hints import beside, named_for
from lorakit.data.conversations import (
    Message,
    conversation,
    exchange,
    history,
    kind_of_value,
    string,
)
from lorakit.data.samples import RowFormat
from lorakit.data.sources import Row
from lorakit.errors import InputError

_BESIDE = ("system", "history", "tools")


def _read_alpaca(row: Row) -> list[Message]:
    question = string(row, row.values["instruction"], "'instruction'")
    context = row.values.get("input")
    if context is not None and (context := string(row, context, "'input'")):
        question = f"{question}\n{context}" if question else context
    answer = string(row, row.values["output"], "'output'")
    return [*history(row), *exchange(question, answer)]


def _read_pair(prompt: str, completion: str) -> Callable[[Row], list[Message]]:
    def read(row: Row) -> list[Message]:
        asked, answered = row.values[prompt], row.values[completion]
        if isinstance(asked, list) and isinstance(answered, list):
            return [*history(row), *conversation(row, prompt), *conversation(row, completion)]
        if isinstance(asked, list) or isinstance(answered, list):
            raise InputError(
                f"{row.where}: '{prompt}' is {kind_of_value(asked)} and '{completion}' is "
                f"{kind_of_value(answered)}; expected two strings or two lists of messages"
            )
        question, answer = (
            string(row, asked, f"'{prompt}'"),
            string(row, answered, f"'{completion}'"),
        )
        return [*history(row), *exchange(question, answer)]

    return read


def _proposed(values: Mapping[str, object]) -> dict[str, str] | None:
    """Columns for a question and an answer, and for what the question is about."""
    strings = [name for name, value in values.items() if isinstance(value, str)]
    answers = named_for(strings, "answer")
    questions, contexts = named_for(strings, "question"), named_for(strings, "context")
    if not questions:
        # One thing that is asked about: a document, or what is called an input.
        about = named_for(strings, "document") or contexts or named_for(strings, "text")
        questions, contexts = about, []
    if len(answers) != 1 or len(questions) != 1 or len(contexts) > 1:
        return None
    more = beside(values, _BESIDE)
    if contexts:
        return {"instruction": questions[0], "input": contexts[0], "output": answers[0], **more}
    return {"prompt": questions[0], "completion": answers[0], **more}


def _pair(prompt: str, completion: str) -> RowFormat:
    return RowFormat((prompt, completion), _read_pair(prompt, completion), _BESIDE)


ALPACA = RowFormat(("instruction", "output"), _read_alpaca, ("input", *_BESIDE), propose=_proposed)
PROMPT_COMPLETION = _pair("prompt", "completion")
PROMPT_RESPONSE = _pair("prompt", "response")
QUESTION_ANSWER = _pair("question", "answer")
