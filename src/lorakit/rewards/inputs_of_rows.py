"""What reward functions are given of a row: the form of TRL, by the form of the row itself.

A row with messages is conversational: prompts and completions are lists of messages. Of all other
rows they are texts, whatever chat template the model has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.data.conversations import Message
from lorakit.data.samples import Sample
from lorakit.rewards.reward_table import RewardInput, Text

_OWN = ("prompt", "completion", "completion_ids")


def is_conversational(columns: Mapping[str, Any]) -> bool:
    """Whether a column has messages (`role` and `content`, or sharegpt's `from` and `value`)."""
    return any(
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(one, Mapping) and ({"role", "from"} & one.keys()) for one in value)
        for value in columns.values()
    )


def reward_columns(sample: Sample) -> dict[str, Any]:
    """The columns that functions get of a row: as in TRL, all but the prompt and its completion."""
    own = sample.columns or {}
    return {name: value for name, value in own.items() if name not in _OWN}


def reward_input(
    sample: Sample,
    text: str,
    ids: Sequence[int] = (),
    messages: Sequence[Message] | None = None,
    finish_reason: str | None = None,
) -> RewardInput:
    """A completion of the row's prompt.

    Args:
        sample: of the row, with its columns.
        text: of the completion, without special tokens.
        ids: its tokens.
        messages: the turns behind the prompt, where there are others than one of the assistant.
    """
    prompt: Text = [dict(one) for one in sample.prompt]
    completion: Text = [dict(one) for one in messages or ()]
    completion = completion or [{"role": "assistant", "content": text}]
    if not messages and not is_conversational(sample.columns or {}):
        asked = [one for one in sample.prompt if one["role"] == "user"]
        prompt, completion = _text(asked[-1]["content"]) if asked else "", text
    return RewardInput(
        prompt,
        completion,
        ids,
        reward_columns(sample),
        sample.where,
        finish_reason,
        sample.reference or None,
        sample.prompt,
    )


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
