"""Pictures in a column of their own: `image`, or `images` in the order of their places.

A place is a part `{"type": "image"}` without a picture (TRL), or the mark `<image>` in a text
(LLaMA-Factory, ms-swift). Without any place they stand before the first question.
"""

from collections.abc import Sequence
from typing import Any

from lorakit.data.conversations import IMAGE, Message, pictures_of
from lorakit.data.pictures import source_of
from lorakit.data.sources import Row
from lorakit.errors import count

COLUMNS = ("images", "image")
MARK = "<image>"


def with_pictures(row: Row, messages: Sequence[Message]) -> list[Message]:
    """The messages with the pictures of the row's columns in their places.

    Raises:
        InputError: there are more pictures than places or fewer, an answer has one, or a picture
            cannot be used.
    """
    given = _given(row)
    messages = list(messages)
    if given:
        messages = _with_places(messages)
    places = sum(source is None for m in messages for source in pictures_of(m["content"]))
    if given and not places and messages:
        messages, places = _in_front(row, messages, len(given)), len(given)
    if messages and places != len(given):
        raise row.error(
            f"has {count(len(given), 'picture')} in its columns and {count(places, 'place')} for "
            f"them ({MARK} or a part of the type image): add or remove what is too many or missing"
        )
    waiting = iter(given)
    filled = [_filled(message, waiting) for message in messages] if places else messages
    if given and not messages:
        raise row.error("is plain text beside pictures: write it as a question and its answer")
    for i, message in enumerate(filled):
        if message["role"] == "assistant" and pictures_of(message["content"]):
            raise row.error(
                f"message {i + 1}, an answer, has a picture, and pictures are read, not written: "
                "move it into a user message"
            )
    return filled


def _given(row: Row) -> list[str]:
    """The pictures of the row's columns."""
    found: list[str] = []
    for name in COLUMNS:
        value: Any = row.values.get(name)
        if value is None or (isinstance(value, (str, bytes, list, dict)) and not value):
            continue
        several = value if isinstance(value, list) else [value]
        for i, one in enumerate(several):
            what = f"{name}[{i}]" if isinstance(value, list) else f"'{name}'"
            found.append(source_of(row, one, what))
    return found


def _with_places(messages: Sequence[Message]) -> list[Message]:
    """With a part without a picture for each `<image>` in a text."""
    changed = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if any(part["type"] == "text" and MARK in part["text"] for part in parts):
            parts = [one for part in parts for one in _cut(part)]
            message = {**message, "content": parts}
        changed.append(message)
    return changed


def _cut(part: dict[str, Any]) -> list[dict[str, Any]]:
    if part["type"] != "text":
        return [part]
    found: list[dict[str, Any]] = []
    for i, text in enumerate(part["text"].split(MARK)):
        if i:
            found.append({"type": IMAGE, IMAGE: None})
        if text:
            found.append({"type": "text", "text": text})
    return found


def _in_front(row: Row, messages: list[Message], pictures: int) -> list[Message]:
    at = next((i for i, m in enumerate(messages) if m["role"] == "user"), None)
    if at is None:
        raise row.error("has pictures, and no user message that could show them; add one")
    content = messages[at]["content"]
    own = [{"type": "text", "text": content}] if isinstance(content, str) else content
    places = [{"type": IMAGE, IMAGE: None} for _ in range(pictures)]
    return [*messages[:at], {**messages[at], "content": [*places, *own]}, *messages[at + 1 :]]


def _filled(message: Message, waiting: Any) -> Message:
    content = message["content"]
    if None not in pictures_of(content):
        return message
    parts = [
        {**part, IMAGE: next(waiting)} if part["type"] == IMAGE and part[IMAGE] is None else part
        for part in content
    ]
    return {**message, "content": parts}
