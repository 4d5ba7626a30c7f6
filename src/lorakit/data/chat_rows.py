"""Rows that hold a conversation in one column: OpenAI's `messages`, ShareGPT's `conversations`."""

from collections.abc import Mapping
from functools import partial

from lorakit.data.column_hints import beside, means
from lorakit.data.conversations import conversation
from lorakit.data.samples import RowFormat


def _proposed(values: Mapping[str, object]) -> dict[str, str] | None:
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


MESSAGES = RowFormat(("messages",), partial(conversation, column="messages"), propose=_proposed)
SHAREGPT = RowFormat(
    ("conversations",),
    partial(conversation, column="conversations", keys=("from", "value"), named_roles=True),
)
