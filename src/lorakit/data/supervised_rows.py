"""The rows of supervised fine-tuning: conversations, a question and its answer, plain text.

A conversation stands in one column (OpenAI's `messages`, ShareGPT's `conversations`), a question
and its answer in two, with earlier turns beside them if any; of plain text everything is learned.
"""

from collections.abc import Callable, Mapping
from functools import partial

from lorakit.data.column_hints import beside, means, named_for
from lorakit.data.conversations import (
    Message,
    conversation,
    exchange,
    history,
    kind_of_value,
    string,
)
from lorakit.data.picture_columns import COLUMNS
from lorakit.data.samples import RowFormat
from lorakit.data.sources import Row

_BESIDE = ("system", "history", "tools", *COLUMNS)


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
            before = conversation(row, prompt)
            return [*history(row), *before, *conversation(row, completion)]
        if isinstance(asked, list) or isinstance(answered, list):
            raise row.error(
                f"'{prompt}' is {kind_of_value(asked)} and '{completion}' is "
                f"{kind_of_value(answered)}; expected two strings or two lists of messages"
            )
        question = string(row, asked, f"'{prompt}'")
        return [*history(row), *exchange(question, string(row, answered, f"'{completion}'"))]

    return read


def proposed_pair(values: Mapping[str, object]) -> dict[str, str] | None:
    """Columns for a question and an answer, and for what the question is about; else None."""
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
    def completed(row: Row) -> int:
        answer = row.values[completion]
        return len(answer) if isinstance(answer, list) else 1

    read = _read_pair(prompt, completion)
    return RowFormat((prompt, completion), read, _BESIDE, completed=completed)


ALPACA = RowFormat(
    ("instruction", "output"),
    _read_alpaca,
    ("input", *_BESIDE),
    propose=proposed_pair,
    completed=lambda row: 1,
)
PROMPT_COMPLETION = _pair("prompt", "completion")
PROMPT_RESPONSE = _pair("prompt", "response")
QUESTION_ANSWER = _pair("question", "answer")


def _proposed_chat(values: Mapping[str, object]) -> dict[str, str] | None:
    for name, value in values.items():
        if means(name, "talk") and (column := _column_for(value)):
            return {column: name, **beside(values, ("system", "tools"))}
    return None


def _column_for(value: object) -> str | None:
    """The column that a list of messages belongs into, by the keys of its first."""
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(first, dict):
        return None
    if {"role", "content"} <= first.keys():
        return "messages"
    return "conversations" if {"from", "value"} <= first.keys() else None


MESSAGES = RowFormat(
    ("messages",),
    partial(conversation, column="messages"),
    ("system", "tools", *COLUMNS),
    propose=_proposed_chat,
)
SHAREGPT = RowFormat(
    ("conversations",),
    partial(
        conversation,
        column="conversations",
        keys=("from", "value"),
        named_roles=True,
    ),
    ("system", "tools", *COLUMNS),
)


def _read_text(row: Row) -> str:
    return string(row, row.values["text"], "'text'", empty=False)


def _proposed_text(values: Mapping[str, object]) -> dict[str, str] | None:
    strings = [name for name, value in values.items() if isinstance(value, str)]
    alone = len(strings) == 1 and means(strings[0], "text") and not named_for(strings, "answer")
    return {"text": strings[0]} if alone else None


TEXT = RowFormat(("text",), _read_text, (), "text", _proposed_text)
