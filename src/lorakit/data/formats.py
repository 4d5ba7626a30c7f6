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

from lorakit.data.column_hints import as_yaml, means, proposed
from lorakit.data.conversations import (
    Message,
    check_conversation,
    conversation,
    exchange,
    history,
    kind_of_value,
    string,
    tools,
)
from lorakit.data.message_marks import take_marks
from lorakit.data.other_objectives import refuse_other_objectives
from lorakit.data.sources import Row
from lorakit.errors import InputError, did_you_mean, listed


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row teaches: a conversation (`messages`), or plain `text` and no messages.

    `tools` are the descriptions of functions that a template shows to the model. `copies` is how
    often an epoch sees the sample. `unlearned` are the positions of answers that are only read.
    """

    messages: tuple[Message, ...]
    text: str | None
    where: str
    tools: tuple[dict[str, Any], ...] = ()
    copies: int = 1
    unlearned: frozenset[int] = frozenset()

    @property
    def learned(self) -> list[int]:
        """The positions of the answers that are learned, in order."""
        return [
            i
            for i, message in enumerate(self.messages)
            if message["role"] == "assistant" and i not in self.unlearned
        ]

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last answer that is learned; none for plain text."""
        return list(self.messages[: self._last_answer])

    @property
    def reference(self) -> str:
        """The last answer that is learned; empty for plain text.

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
        return max(self.learned, default=0)


def to_sample(row: Row, columns: Mapping[str, str] | None = None) -> Sample:
    """The sample in `row`; `columns` as for `recognise`.

    Raises:
        InputError: the row fits no format or several, or a value in it cannot be used.
    """
    refuse_other_objectives(row, columns or {})
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
    fitting = _fitting(row.values, columns)
    if not fitting:
        raise InputError(_fits_nothing(row))
    if len(fitting) > 1:
        first = fitting[0]
        example = ", ".join(f"{name}: {name}" for name in first.required)
        raise InputError(
            f"{row.where}: its columns fit {' and '.join(form.label for form in fitting)}; "
            f"say which is meant in the recipe, e.g. data.columns: {{{example}}}"
        )
    if fitting[0].read is None and not columns and (hint := _text_and_answer(row)):
        raise InputError(hint)
    return fitting[0], row


def _fitting(values: Mapping[str, Any], columns: Mapping[str, str]) -> list["Format"]:
    """The formats whose columns are all there, and that have those of the mapping."""
    return [
        form
        for form in _FORMATS
        if columns.keys() <= form.columns and all(name in values for name in form.required)
    ]


def _text_and_answer(row: Row) -> str | None:
    """What to say of a row with a `text` and what looks like its answer (BillSum's summary)."""
    answers = [n for n, v in row.values.items() if means(n, "answer") and v and isinstance(v, str)]
    if not answers:
        return None
    return (
        f"{row.where}: it has 'text' and '{answers[0]}', so either the text is learned or an "
        "answer to it; say which is meant in the recipe, data.columns: {text: text} or "
        f"data.columns: {as_yaml({'prompt': 'text', 'completion': answers[0]})}"
    )


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
    hint = proposed(row.values)
    if hint and len(_fitting(_renamed(row, hint).values, hint)) == 1:
        example = f"e.g. data.columns: {as_yaml(hint)}"
    elif len(own) == 1:
        example = f"e.g. data.columns: {as_yaml({'text': own[0]})}"
    else:
        example = "as data.columns: {prompt: YOUR_QUESTIONS, completion: YOUR_ANSWERS}"
    return (
        f"{row.where}: its columns ({listed(map(_shown, own)) or 'none'}) fit no format; accepted "
        f"are {_ACCEPTED}; name yours in the recipe, {example} (lorakit eval: --columns)"
    )


def _shown(name: str) -> str:
    """A column's name, in quotes where white space would not be seen."""
    return name if name == name.strip() and name else repr(name)


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
        messages, unlearned = take_marks(row, [*system_message(row), *self.read(row)])
        check_conversation(row, messages)
        sample = Sample(tuple(messages), None, row.where, tools(row), unlearned=unlearned)
        if not sample.learned:
            raise InputError(
                f"{row.where}: every answer is marked as not learned, so there is nothing to "
                "learn; drop the row"
            )
        return sample


_BESIDE_PAIRS = ("system", "history", "tools")
_FORMATS = (
    Format(("messages",), partial(conversation, column="messages")),
    Format(("instruction", "output"), _read_alpaca, ("input", *_BESIDE_PAIRS)),
    Format(("prompt", "completion"), _read_pair("prompt", "completion"), _BESIDE_PAIRS),
    Format(("prompt", "response"), _read_pair("prompt", "response"), _BESIDE_PAIRS),
    Format(("question", "answer"), _read_pair("question", "answer"), _BESIDE_PAIRS),
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
