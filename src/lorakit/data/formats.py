"""Rows to samples: which of the known dataset formats a row has, and the conversation it holds.

The format is found from the columns of each row, or told by the recipe's `data.columns`. What a
message or a tool call must be like is checked in `lorakit.data.conversations`; how a conversation
becomes text is the template's business (`lorakit.data.templates`).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from lorakit.data.conversations import (
    Message,
    check_conversation,
    conversation,
    exchange,
    kind_of_value,
    list_of,
    string,
    tools,
)
from lorakit.data.sources import Row
from lorakit.errors import InputError, did_you_mean, listed


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row teaches: a conversation (`messages`), or plain `text` and no messages.

    `tools` are the descriptions of functions that a template shows to the model. `copies` is how
    often an epoch sees the sample.
    """

    messages: tuple[Message, ...]
    text: str | None
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    copies: int = 1

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last answer; none for plain text."""
        return list(self.messages[: self._last_answer])

    @property
    def reference(self) -> str:
        """The last answer; empty for plain text.

        The calls of an answer stand in it as JSON `{"name": ..., "arguments": {...}}`, one a line,
        behind the text if there is any: that is what most templates make of them, but for the
        tags around it.
        """
        if not self.messages:
            return ""
        answer = self.messages[self._last_answer]
        calls = [
            {key: call["function"][key] for key in ("name", "arguments")}
            for call in answer.get("tool_calls", ())
        ]
        lines = [answer["content"], *(json.dumps(call, ensure_ascii=False) for call in calls)]
        return "\n".join(lines if answer["content"] or not calls else lines[1:])

    @property
    def prompt_key(self) -> str:
        """Equal for samples that ask the same with the same tools; for plain text, the text."""
        if self.text is not None:
            return self.text
        asked = [self.prompt, *([self.tools] if self.tools else [])]
        return json.dumps(asked, sort_keys=True, ensure_ascii=False)

    @property
    def _last_answer(self) -> int:
        answers = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return answers[-1] if answers else 0


def to_sample(row: Row, columns: Mapping[str, str] | None = None) -> Sample:
    """The sample in `row`; `columns` as for `recognise`.

    Raises:
        InputError: the row fits no format or several, or a value in it cannot be used.
    """
    form, row = recognise(row, columns or {})
    return form.sample(row)


def recognise(row: Row, columns: Mapping[str, str]) -> tuple["Format", Row]:
    """The format of a row, and the row under that format's column names.

    `columns` maps a format's column to the file's own, such as
    `{"prompt": "mr", "completion": "ref"}`; it also settles which format is meant when a row
    fits several.

    Raises:
        InputError: the row fits no format or several.
    """
    check_columns(columns)
    row = _renamed(row, columns)
    fitting = [
        form
        for form in _FORMATS
        if columns.keys() <= form.columns and all(name in row.values for name in form.required)
    ]
    if not fitting:
        raise InputError(_fits_nothing(row))
    if len(fitting) > 1:
        first = fitting[0]
        example = ", ".join(f"{name}: {name}" for name in first.required)
        raise InputError(
            f"{row.where}: its columns fit {' and '.join(form.label for form in fitting)}; "
            f"say which is meant in the recipe, e.g. data.columns: {{{example}}}"
        )
    return fitting[0], row


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse a `data.columns` mapping that no format could use.

    Raises:
        InputError: a key is no known column, or the keys belong to different formats.
    """
    for name in columns:
        if name not in _KNOWN_COLUMNS:
            raise InputError(
                f"data.columns: '{name}' is not a column of any format"
                f"{did_you_mean(name, _KNOWN_COLUMNS)}; known are {', '.join(_KNOWN_COLUMNS)}"
            )
    if not any(columns.keys() <= form.columns for form in _FORMATS):
        raise InputError(
            f"data.columns: no format has all of {', '.join(columns)}; accepted are {_ACCEPTED}"
        )


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the format's column names; a column that was renamed loses its own name."""
    for name, own in columns.items():
        if own not in row.values:
            raise InputError(
                f"{row.where}: no column '{own}', which data.columns gives for '{name}'"
                f"{did_you_mean(own, row.values)}; correct it, the row has {listed(row.values)}"
            )
    taken = set(columns.values())
    values = {name: value for name, value in row.values.items() if name not in taken}
    values |= {name: row.values[own] for name, own in columns.items()}
    return dataclasses.replace(row, values=values)


def _fits_nothing(row: Row) -> str:
    own = list(row.values)
    example = f"{{text: {own[0]}}}" if len(own) == 1 else "{prompt: question, completion: reply}"
    if len(own) > 1:
        example = f"{{prompt: {own[0]}, completion: {own[1]}}}"
    return (
        f"{row.where}: its columns ({listed(own) or 'none'}) fit no format; accepted are "
        f"{_ACCEPTED}; name yours in the recipe, e.g. data.columns: {example} "
        "(lorakit eval: --columns)"
    )


def _read_alpaca(row: Row) -> list[Message]:
    question = string(row, row.values["instruction"], "'instruction'")
    context = row.values.get("input")
    if context is not None and (context := string(row, context, "'input'")):
        question = f"{question}\n{context}" if question else context
    answer = string(row, row.values["output"], "'output'")
    turns: list[Message] = []
    history = row.values.get("history")
    for i, pair in enumerate(
        list_of(row, [] if history is None else history, "'history'", "pairs")
    ):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{row.where}: history[{i}] must be a pair [question, answer]")
        turns += exchange(*(string(row, text, f"history[{i}]") for text in pair))
    return turns + exchange(question, answer)


def _read_pair(prompt: str, completion: str) -> Callable[[Row], list[Message]]:
    def read(row: Row) -> list[Message]:
        asked, answered = row.values[prompt], row.values[completion]
        if isinstance(asked, list) and isinstance(answered, list):
            return conversation(row, prompt) + conversation(row, completion)
        if isinstance(asked, list) or isinstance(answered, list):
            raise InputError(
                f"{row.where}: '{prompt}' is {kind_of_value(asked)} and '{completion}' is "
                f"{kind_of_value(answered)}; expected two strings or two lists of messages"
            )
        return exchange(string(row, asked, f"'{prompt}'"), string(row, answered, f"'{completion}'"))

    return read


def system_message(row: Row) -> list[Message]:
    """The message in the optional `system` column; null and empty mean that there is none."""
    value = row.values.get("system")
    if value is None or value == "":
        return []
    return [{"role": "system", "content": string(row, value, "'system'")}]


@dataclass(frozen=True)
class Format:
    """A dataset format: the columns that tell it, and how a conversation is read from them."""

    required: tuple[str, ...]
    read: Callable[[Row], list[Message]] | None  # None: plain text
    optional: tuple[str, ...] = ("system", "tools")

    @property
    def label(self) -> str:
        """Its name in messages, such as `prompt+completion`."""
        return "+".join(self.required)

    @cached_property
    def columns(self) -> frozenset[str]:
        """All columns that it reads."""
        return frozenset({*self.required, *self.optional})

    def sample(self, row: Row) -> Sample:
        """The sample in a row of this format. Raises InputError for a value of no use."""
        if self.read is None:
            text = string(row, row.values["text"], "'text'", empty=False)
            return Sample((), text, row.where)
        messages = [*system_message(row), *self.read(row)]
        check_conversation(row, messages)
        return Sample(tuple(messages), None, row.where, tools(row))


_FORMATS = (
    Format(("messages",), partial(conversation, column="messages")),
    Format(("instruction", "output"), _read_alpaca, ("input", "system", "history", "tools")),
    Format(("prompt", "completion"), _read_pair("prompt", "completion")),
    Format(("prompt", "response"), _read_pair("prompt", "response")),
    Format(("question", "answer"), _read_pair("question", "answer")),
    Format(
        ("conversations",),
        partial(conversation, column="conversations", keys=("from", "value"), named_roles=True),
    ),
    Format(("text",), None, ()),
)
_ACCEPTED = ", ".join(form.label for form in _FORMATS)
_KNOWN_COLUMNS = list(
    dict.fromkeys(name for form in _FORMATS for name in (*form.required, *form.optional))
)
