"""The text of a completion, which is a text already or the messages that were written."""

from __future__ import annotations

from typing import Any


def text_of(completion: Any) -> str:
    """A text as it is; of messages the content of the assistant's last one, empty where it has
    none (it calls tools alone)."""
    if isinstance(completion, str):
        return completion
    answers = [one for one in completion or () if one.get("role", "assistant") == "assistant"]
    return _content(answers[-1].get("content")) if answers else ""


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = (part.get("text", "") for part in content if isinstance(part, dict))
    return "".join(part for part in parts if part)


def behind(text: str, mark: str | None) -> str:
    """What stands behind the last `mark`; nothing where it is missing, all without a mark."""
    return text.rpartition(mark)[2] if mark and mark in text else "" if mark else text
