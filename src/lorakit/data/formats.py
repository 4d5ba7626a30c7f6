"""Rows to samples: which of the known dataset formats a row has, and the conversation it holds.

The format is found from the columns of each row, or told by the recipe's `data.columns`. How a
conversation becomes text is the template's business (`lorakit.data.templates`).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.sources import Row
from lorakit.errors import InputError, did_you_mean, listed

Message = dict[str, Any]
"""`{"role": ..., "content": ...}`, and whatever else a template may read, such as `name`."""

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """What one row teaches: a conversation (`messages`), or plain `text` and no messages.

    `tools` are the descriptions of functions that a template shows to the model.
    """

    messages: tuple[Message, ...]
    text: str | None
    where: str
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last answer; none for plain text."""
        return list(self.messages[: self._last_answer])

    @property
    def reference(self) -> str:
        """The last answer; empty for plain text."""
        return self.messages[self._last_answer]["content"] if self.messages else ""

    @property
    def prompt_key(self) -> str:
        """Equal for samples that ask the same; for plain text, the text itself."""
        if self.text is not None:
            return self.text
        return json.dumps(self.prompt, sort_keys=True, ensure_ascii=False, default=str)

    @property
    def _last_answer(self) -> int:
        answers = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return answers[-1] if answers else 0


def to_sample(row: Row, columns: Mapping[str, str] | None = None) -> Sample:
    """The sample in `row`.

    `columns` maps a format's column to the file's own, such as
    `{"prompt": "mr", "completion": "ref"}`; it also settles which format is meant when a row
    fits several.

    Raises:
        InputError: the row fits no format or several, or a value in it cannot be used.
    """
    columns = columns or {}
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
    if fitting[0].read is None:
        text = _string(row, row.values["text"], "'text'", empty=False)
        return Sample((), text, row.where)
    messages = [*_system(row), *fitting[0].read(row)]
    _check_conversation(row, messages)
    return Sample(tuple(messages), None, row.where)


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
            f"data.columns: no format has all of {', '.join(columns)}; the formats are {_ACCEPTED}"
        )


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the format's column names; a column that was renamed loses its own name."""
    for name, own in columns.items():
        if own not in row.values:
            raise InputError(
                f"{row.where}: no column '{own}', which data.columns gives for '{name}'"
                f"{did_you_mean(own, row.values)}; the row has {listed(row.values)}"
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


def _kind(value: object) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _string(row: Row, value: object, what: str, empty: bool = True) -> str:
    if not isinstance(value, str):
        raise InputError(f"{row.where}: {what} is {_kind(value)}, expected a string")
    if not empty and not value.strip():
        raise InputError(f"{row.where}: {what} is empty; fill it or drop the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud83d" alone in JSON; tokenizers cannot take it
        raise InputError(
            f"{row.where}: {what} holds half of a surrogate pair; repair it"
        ) from error
    return value


def _list(row: Row, value: object, what: str, of: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{row.where}: {what} is {_kind(value)}, expected a list of {of}")
    return value


def _message(
    row: Row, item: object, what: str, keys: tuple[str, str], roles: Mapping[str, str]
) -> Message:
    """One element of a conversation as a message; `keys` are its names for role and content."""
    if not isinstance(item, dict):
        raise InputError(f"{row.where}: {what} is {_kind(item)}, expected an object with {keys}")
    for key in keys:
        if key not in item:
            raise InputError(
                f"{row.where}: {what} has no '{key}', expected an object with {keys}; "
                f"it has {listed(map(str, item)) or 'nothing'}"
            )
    role = _string(row, item[keys[0]], f"{what}.{keys[0]}")
    if role not in roles:
        raise InputError(
            f"{row.where}: {what} has the unknown role {role[:40]!r}{did_you_mean(role, roles)}; "
            f"roles are {', '.join(roles)}"
        )
    content = _string(row, item[keys[1]], f"{what}.{keys[1]}")
    # Parquet fills the keys that a message lacks with null; templates test for their presence.
    others = {k: v for k, v in item.items() if k not in keys and v is not None}
    return {"role": roles[role], "content": content, **others}


def _conversation(row: Row, column: str) -> list[Message]:
    """A list of `{role, content}` objects."""
    items = _list(row, row.values[column], f"'{column}'", "{role, content} objects")
    roles = {role: role for role in ROLES}
    return [
        _message(row, item, f"{column}[{i}]", ("role", "content"), roles)
        for i, item in enumerate(items)
    ]


def _read_messages(row: Row) -> list[Message]:
    return _conversation(row, "messages")


def _read_sharegpt(row: Row) -> list[Message]:
    items = _list(row, row.values["conversations"], "'conversations'", "{from, value} objects")
    return [
        _message(row, item, f"conversations[{i}]", ("from", "value"), SHAREGPT_ROLES)
        for i, item in enumerate(items)
    ]


def _read_alpaca(row: Row) -> list[Message]:
    question = _string(row, row.values["instruction"], "'instruction'")
    context = row.values.get("input")
    if context is not None and (context := _string(row, context, "'input'")):
        question = f"{question}\n{context}" if question else context
    answer = _string(row, row.values["output"], "'output'")
    turns: list[Message] = []
    history = row.values.get("history")
    for i, pair in enumerate(_list(row, [] if history is None else history, "'history'", "pairs")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{row.where}: history[{i}] must be a pair [question, answer]")
        turns += _exchange(*(_string(row, text, f"history[{i}]") for text in pair))
    return turns + _exchange(question, answer)


def _read_pair(prompt: str, completion: str) -> Callable[[Row], list[Message]]:
    def read(row: Row) -> list[Message]:
        asked, answered = row.values[prompt], row.values[completion]
        if isinstance(asked, list) and isinstance(answered, list):
            return _conversation(row, prompt) + _conversation(row, completion)
        if isinstance(asked, list) or isinstance(answered, list):
            raise InputError(
                f"{row.where}: '{prompt}' is {_kind(asked)} and '{completion}' is "
                f"{_kind(answered)}; expected two strings or two lists of messages"
            )
        return _exchange(
            _string(row, asked, f"'{prompt}'"), _string(row, answered, f"'{completion}'")
        )

    return read


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(row: Row) -> list[Message]:
    """The optional `system` column; null and empty mean that there is none."""
    value = row.values.get("system")
    if value is None or value == "":
        return []
    return [{"role": "system", "content": _string(row, value, "'system'")}]


def _check_conversation(row: Row, messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if roles[:2] == ["system", "system"]:
        raise InputError(
            f"{row.where}: a system message in the 'system' column and in the messages"
        )
    if "assistant" not in roles:
        raise InputError(
            f"{row.where}: no assistant message, so there is nothing to learn; add one"
        )
    if roles.index("assistant") == 0 and roles.count("assistant") == 1:
        raise InputError(f"{row.where}: nothing comes before the answer; add a user message")
    for message in messages:
        if message["role"] == "user" and not message["content"].strip():
            raise InputError(f"{row.where}: a user message is empty; fill it or drop the row")


@dataclass(frozen=True, slots=True)
class _Format:
    """A dataset format: the columns that tell it, and how a conversation is read from them."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row], list[Message]] | None  # None: plain text

    @property
    def label(self) -> str:
        return "+".join(self.required)

    @property
    def columns(self) -> set[str]:
        return {*self.required, *self.optional}


_FORMATS = (
    _Format(("messages",), ("system",), _read_messages),
    _Format(("instruction", "output"), ("input", "system", "history"), _read_alpaca),
    _Format(("prompt", "completion"), ("system",), _read_pair("prompt", "completion")),
    _Format(("prompt", "response"), ("system",), _read_pair("prompt", "response")),
    _Format(("question", "answer"), ("system",), _read_pair("question", "answer")),
    _Format(("conversations",), ("system",), _read_sharegpt),
    _Format(("text",), (), None),
)
_ACCEPTED = ", ".join(form.label for form in _FORMATS)
_KNOWN_COLUMNS = list(
    dict.fromkeys(name for form in _FORMATS for name in (*form.required, *form.optional))
)
